"""Where the seconds of a step go on a GPU: kernels by what they are for, and the time in which none runs.

`pytest benchmarks --causes`. The profiler watches a round of its own after the timed ones, the GPU's side alone, since
watching the host would slow down what is to be explained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Kernel = tuple[str, float, float]  # name, start and end in seconds

# The first pattern found in a kernel's name decides.
KINDS: tuple[tuple[str, str], ...] = (
    ("loss", r"cross_entropy|online_softmax"),
    ("attention", r"fmha|flash|sdpa|attn|attention"),
    (
        "delta rule",
        r"gated_delta|delta_rule|delta_h|chunk_|recompute_w_u|prepare_wy|solve_tri|cumsum|l2norm|causal_conv",
    ),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|splitk|gemv"),
    ("exchange of tokens", r"permut|sort|topk|histogram|bincount|scatter|gather|index|router|moe"),
    ("rope", r"rope|rotary"),
    ("norms", r"norm"),
    ("copies", r"memcpy|memset|copy|cat"),
    ("elementwise", r"elementwise|pointwise|swiglu|silu|gelu|geglu|mul|add|reduce|triton_|fill|cast|transpose"),
)


@dataclass(frozen=True)
class Causes:
    """Of one step, in seconds: `total`, of which `kinds` of kernels and `idle`, when none ran; and how many were launched.
    `unknown`: names that fit no kind, which `kinds` has as "other"."""

    total: float
    kinds: dict[str, float]
    idle: float
    launches: float
    unknown: tuple[str, ...]

    def line(self) -> str:
        """6.40 ms: idle 4.21, matrix products 1.80, ...; 1240 launches"""
        parts = [("idle", self.idle), *self.kinds.items()]
        parts.sort(key=lambda part: -part[1])
        text = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in parts if seconds > 0)
        names = f"; other: {', '.join(self.unknown[:3])}" if self.unknown else ""
        return f"{1e3 * self.total:.2f} ms: {text}; {self.launches:.0f} launches{names}"


def kind_of(kernel: str) -> str | None:
    """None for a name that fits no kind."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)), None)


def split(kernels: Iterable[Kernel], *, steps: int, seconds: float) -> Causes:
    """`seconds`: a step as it was timed, without a profiler. Kernels that overlap count for each of their kinds and once for
    the time that is not idle."""
    ordered = sorted(kernels, key=lambda kernel: kernel[1])
    kinds: dict[str, float] = {}
    unknown: dict[str, float] = {}
    busy, until = 0.0, float("-inf")
    for name, start, end in ordered:
        kind = kind_of(name)
        if kind is None:
            unknown[name] = unknown.get(name, 0.0) + end - start
        kinds[kind or "other"] = kinds.get(kind or "other", 0.0) + (end - start) / steps
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    most = tuple(sorted(unknown, key=lambda name: -unknown[name]))
    return Causes(seconds, kinds, max(0.0, seconds - busy / steps), len(ordered) / steps, most)


def watched(run: Callable[[], None]) -> list[Kernel]:
    """The kernels that `run` makes a GPU run. RuntimeError when it sees none: the profiler is not to be had here."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        run()
        torch.cuda.synchronize()
    events = [e for e in found.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    if not events:
        raise RuntimeError("the profiler saw no kernel: has this process the right to use CUPTI?")
    return [(e.name, e.time_range.start / 1e6, e.time_range.end / 1e6) for e in events]
