"""Gradients of Hugging Face's own model, and fingerprints of them that are small enough for a golden.

The backward starts from a fixed random cotangent on the logits and not from a loss: rows of vocabulary padding take part in
Megatron's softmax, so a cross-entropy would differ between layouts of a correct model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

import toy_models
from harness.compare import relative_rms

PROJECTIONS = 4

Gradients = Mapping[str, torch.Tensor]


def cotangents(row: str, shape: tuple[int, ...], *, heads: int = 0) -> torch.Tensor:
    """What the gradient of the logits is, float32 [1 + heads, batch, sequence, vocab] for the main model and its heads of
    multi-token prediction; the same in every run. The last k places of head k have no token to see: zero there."""
    batch, length, vocab = shape
    whole = torch.zeros(1 + heads, *shape)
    for k in range(1 + heads):
        name = f"cotangent of {row}" + (f", head {k}" if k else "")
        values = toy_models.random_tensor(name, (batch, length - k, vocab), kind="matrix")
        whole[k, :, : length - k] = torch.from_numpy(values)
    return whole


def hf_gradients(row: str, model: PreTrainedModel, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """{name in the published checkpoint: gradient of sum(logits x weights)}, of the tensors that get one.

    Renaming and fusing are linear, so gradients are published under the parameters' names like any weights. The model's
    own weights and `.grad` are left alone.
    """
    heads: Any = getattr(model, "mtp", None)
    made = [model(ids, use_cache=False).logits]
    parameters = {("", name): parameter for name, parameter in model.named_parameters()}  # a tied tensor once
    if heads is not None:
        made += toy_models.mtp.logits(heads, model, ids)
        own = toy_models.mtp.parameters(heads).items()
        parameters |= {("mtp", name): tensor for name, tensor in own if tensor.requires_grad}
    total = sum(
        (one * weight[:, : one.shape[1]].to(one.dtype)).sum() for one, weight in zip(made, weights, strict=True)
    )
    trained = {key: parameter for key, parameter in parameters.items() if parameter.requires_grad}
    found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)  # type: ignore[arg-type]
    state: dict[str, dict[str, torch.Tensor]] = {"": {}, "mtp": {}}
    for (part, name), gradient in zip(trained, found, strict=True):
        if gradient is not None:
            state[part][name] = gradient
    return toy_models.published(row, model, state[""], state["mtp"])


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
