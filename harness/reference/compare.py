"""Comparison of two tensors by relative RMS error."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Comparison:
    """`value`: relative RMS error; `ok`: it is finite and at most `limit`; `detail`: a line for people."""

    value: float
    limit: float
    ok: bool
    detail: str


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS(actual - expected) / RMS(expected), in float64.

    Infinite when either holds a NaN or an infinity, when there is nothing to compare (no elements), and when
    `expected` is all zero but `actual` is not. ValueError unless the shapes are equal: nothing is broadcast.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shape {list(actual.shape)} is not the expected {list(expected.shape)}")
    wanted = expected.detach().to(torch.float64)
    error = (actual.detach().to(torch.float64) - wanted).norm().item()
    size = wanted.norm().item()
    if expected.numel() == 0 or not math.isfinite(error) or not math.isfinite(size):
        return math.inf
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return error / size


def compare(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> Comparison:
    """Compare two tensors of one shape [..., last], for logits [batch, sequence, vocab].

    The detail gives the largest absolute difference, at how many positions the argmax over the last
    dimension agrees and, if not ok, where the worst element is. No elements is a failure. ValueError: see
    `relative_rms`.
    """
    value = relative_rms(actual, expected)
    ok = math.isfinite(value) and value <= limit
    if expected.numel() == 0:
        return Comparison(value, limit, ok, f"nothing to compare: {list(expected.shape)} has no elements")

    got, wanted = (tensor.detach().to(torch.float64).reshape(-1) for tensor in (actual, expected))
    # A NaN would hide behind a large difference elsewhere, and two equal infinities differ by NaN.
    distance = (got - wanted).abs().nan_to_num(nan=math.inf)
    last = expected.shape[-1] if expected.ndim else 1
    agree = got.view(-1, last).argmax(-1) == wanted.view(-1, last).argmax(-1)
    detail = f"max abs {distance.max().item():.3g}, argmax agrees at {int(agree.sum())} of {agree.numel()}"
    if not ok:
        worst = int(distance.argmax())
        where = [int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape)]
        detail += f", worst at {where}: {got[worst].item():.6g} where {wanted[worst].item():.6g} is expected"
    return Comparison(value, limit, ok, detail)
