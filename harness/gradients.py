"""Gradients of Hugging Face's own model, and fingerprints of them that are small enough for a golden.

The backward starts from a fixed random cotangent on the logits and not from a loss: rows of vocabulary padding take part in
Megatron's softmax, so a cross-entropy would differ between layouts of a correct model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import toy_models
from harness.compare import relative_rms

PROJECTIONS = 4

Gradients = Mapping[str, torch.Tensor]


def cotangent(row: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What the logits' gradient is, float32 [batch, sequence, vocab]; the same in every run."""
    return torch.from_numpy(toy_models.random_tensor(f"cotangent of {row}", shape, kind="matrix"))


def hf_gradients(model: PreTrainedModel, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """{name in the published checkpoint: gradient of sum(logits x weights)}, of the tensors that get one.

    Renaming and fusing are linear, so gradients are saved under the parameters' names like any weights. The model's own
    weights and `.grad` are left alone.
    """
    logits = model(ids, use_cache=False).logits
    parameters = dict(model.named_parameters())  # a tied tensor once
    found = torch.autograd.grad((logits * weights.to(logits.dtype)).sum(), list(parameters.values()), allow_unused=True)
    with tempfile.TemporaryDirectory() as folder:
        state = {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}
        model.save_pretrained(folder, state_dict=state)
        saved = [load_file(file) for file in Path(folder).glob("*.safetensors")]
    return {name: grad for part in saved for name, grad in part.items()}


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
