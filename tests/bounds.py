"""How far apart two computations of the same numbers may be: relative RMS, in units of the format's own rounding.

A bound that one processor's kernels happen to meet elementwise fails on another processor, whose kernels add in another
order: a gradient of RMS 450 differs there by 9e-4 in its worst element and by 2.7e-7 in relative RMS. Relative RMS of a sum
of n products grows like sqrt(n) roundings whatever the order, so the bound below follows from the format alone.
"""

from __future__ import annotations

import torch

from harness.reference import goldens
from harness.reference.compare import compare, relative_rms

STEPS = 64
"""Roundings that may stand on one another. Toys add at most a few hundred products (sqrt: below 20) in at most three
operators on end, forwards and backwards; the smallest bugs that tests inject are 1e-3 or more, 8,000 roundings of fp32."""

APART = 1e-3
"""Results of two different formulas are further apart than this: 8,000 roundings of fp32."""


def roundings(dtype: torch.dtype = torch.float32, steps: float = STEPS) -> float:
    """The relative RMS that `steps` roundings to `dtype` make at most: each is off by half an epsilon or less."""
    return steps * torch.finfo(dtype).eps / 2


def of_row(row: str) -> float:
    """The relative RMS of two fp32 computations of a row's logits at most, from fp64.

    The golden says how far Hugging Face in fp32 is from fp64 (and eager from SDPA attention). Two such computations are
    twice that apart; another processor's kernels may be off by twice as much.
    """
    return 4 * max(goldens.load(row).provenance["noise"].values())


def of_gradients(row: str) -> float:
    """The same for the gradients of a row: the worst tensor's distance from fp64, four times."""
    return 4 * goldens.load(row).provenance["gradient_noise"]


def assert_same(found: torch.Tensor, expected: torch.Tensor, limit: float | None = None) -> None:
    """Both compute the same: their relative RMS is within `limit` (`roundings()` of fp32 unless given)."""
    result = compare(found, expected, roundings() if limit is None else limit)
    assert result.ok, f"relative RMS {result.value:.3g} > {result.limit:.3g}: {result.detail}"


def assert_apart(found: torch.Tensor, other: torch.Tensor, least: float = APART) -> None:
    """They compute something different: what would be wrong here does not hide below the bound."""
    assert relative_rms(found, other) > least
