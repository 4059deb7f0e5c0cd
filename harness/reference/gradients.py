"""Gradients of Hugging Face's own model, and fingerprints of them that are small enough for a golden.

The backward starts from a fixed random cotangent on the logits and not from a loss: rows of vocabulary padding take part in
Megatron's softmax, so a cross-entropy would differ between layouts of a correct model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import toy_models
from harness.reference.compare import relative_rms

PROJECTIONS = 4

Gradients = Mapping[str, torch.Tensor]


def cotangents(row: str, logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the gradients of the logits are, float32 [1 + heads, batch, sequence, vocab], for the main model's logits and
    those of its heads of multi-token prediction; zero at the last k places of head k, which have no token to see."""
    whole = torch.zeros(len(logits), *logits[0].shape)
    for k, one in enumerate(logits):
        name = f"cotangent of {row}" + (f" head {k}" if k else "")
        whole[k, :, : one.shape[1]] = torch.from_numpy(toy_models.random_tensor(name, one.shape, kind="matrix"))
    return whole


def hf_gradients(row: str, model: Any, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """{name in the published checkpoint: gradient of the sum of logits x weights} of a toy model, of the tensors that get
    one: buffers and frozen parameters have none by nature.

    Renaming and fusing are linear, so a model whose weights are the gradients is saved like any other. The model gets its
    own weights back.
    """
    made = [model(ids, use_cache=False).logits]
    if model.mtp is not None:
        made += toy_models.mtp.logits(model.mtp, model, ids)
    total = torch.stack([(m * w[:, : m.shape[1]].to(m.dtype)).sum() for m, w in zip(made, weights, strict=True)]).sum()
    parts = [part for part in (model, model.mtp) if part is not None]
    tensors = {id(t): t for part in parts for t in (*part.parameters(), *part.buffers())}  # a tied one once
    trained = [t for t in tensors.values() if t.requires_grad]
    found = torch.autograd.grad(total, trained, materialize_grads=True, allow_unused=True)
    kept = [(t, t.data) for t in tensors.values()]
    try:
        for tensor in tensors.values():
            tensor.data = torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor.data
        for tensor, gradient in zip(trained, found, strict=True):
            tensor.data = gradient
        with tempfile.TemporaryDirectory() as folder:
            toy_models.save(row, model, folder)
            saved = [load_file(file) for file in Path(folder).glob("*.safetensors")]
    finally:
        for tensor, data in kept:
            tensor.data = data
    return {name: grad for part in saved for name, grad in part.items() if not grad.isnan().all()}


def worst_difference(actual: Gradients, expected: Gradients) -> float:
    """The largest relative RMS of one tensor; infinite unless both hold the same names."""
    if actual.keys() != expected.keys():
        return float("inf")
    return max(relative_rms(actual[name], expected[name]) for name in expected)


def fingerprints(gradients: Gradients) -> torch.Tensor:
    """float32 [tensors, 1 + PROJECTIONS], a line per tensor in the order of names: its norm, and its products with random
    tensors of mean square 1. Those of a difference have the difference's norm as their root mean square."""
    lines = []
    for name in sorted(gradients):
        values = gradients[name].detach().numpy().astype(np.float64)
        shape = (PROJECTIONS, values.size)
        random = toy_models.random_tensor(f"projections of {name}", shape, kind="embedding").astype(np.float64)
        lines.append([np.linalg.norm(values), *(random @ values.reshape(-1))])
    return torch.tensor(lines, dtype=torch.float32)


def compare_fingerprints(gradients: Gradients, golden: torch.Tensor, limit: float) -> list[str]:
    """What a golden's fingerprints say against gradients: a line for each tensor that is off by more than `limit`, as
    estimated relative RMS."""
    actual = fingerprints(gradients)
    if actual.shape != golden.shape:
        return [f"the golden has fingerprints {list(golden.shape)}, the gradients have {list(actual.shape)}"]
    wrong = []
    for name, now, then in zip(sorted(gradients), actual.double(), golden.double(), strict=True):
        norm, difference = then[0].item(), (now - then)
        off = max(difference[0].abs().item(), difference[1:].square().mean().sqrt().item())
        if not off <= limit * norm:
            size = f"{off / norm:.2g}" if norm else f"{off:.2g} (absolute: the golden has no gradient there)"
            wrong.append(f"Hugging Face's gradient of {name} is off from the golden's fingerprint by {size}")
    return wrong
