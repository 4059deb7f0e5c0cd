"""Where the seconds of a step go on a GPU: kernels by what they are for, and the time in which none runs.

`pytest benchmarks --causes`. The profiler watches a round of its own after the timed ones, the GPU's side alone, since
watching the host would slow down what is to be explained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Span = tuple[str, float, float]  # of a kernel, or of a call of the host: name, start and end in seconds

# The first pattern found in a kernel's name decides.
KINDS: tuple[tuple[str, str], ...] = (
    ("loss", r"cross_entropy|online_softmax"),
    ("attention", r"fmha|flash|sdpa|attn|attention|dot_do_o|convert_dq"),
    (
        "gather and sort",
        r"permut|sort|row_id_map|topk|histogram|bincount|scatter|gather|index|unique|segment|router|moe",
    ),
    (
        "delta rule",
        r"gated_delta|delta_rule|delta_h|chunk_|recompute_w_u|prepare_wy|solve_tri|merge_|cumsum|l2norm|causal_conv"
        r"|^kernel_kernel$",  # tilelang's name for each of its own; nothing else here is made with it
    ),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|splitk|gemv"),
    ("rope", r"rope|rotary"),
    ("norms", r"norm"),
    ("copies", r"memcpy|memset|copy|cat|roll"),
    (
        "elementwise",
        r"elementwise|pointwise|swiglu|silu|gelu|geglu|mul|add|reduce|scan|softmax|triton_|fill|cast|transpose",
    ),
)
# Calls in which the host waits for a GPU: a copy from it to pageable memory among them. The profiler's own end is not.
WAITS = r"cu(da)?((Stream|Event)Synchronize|Memcpy)"
PROFILER = r"cu(da)?(Device|Ctx)Synchronize"


@dataclass(frozen=True)
class Causes:
    """Of one step, in seconds: `total` is the sum of `kinds`, by the kernel that began first where some overlap, and of
    `idle`, when none ran. Beside them what the host did in that step: it waited (`waits`) and was in other calls of CUDA
    (`calls`); the rest is its own work, Python's mostly. `launches`: kernels. `unknown`: names that fit no kind, which
    `kinds` has as "other"."""

    total: float
    kinds: dict[str, float]
    idle: float
    waits: float
    calls: float
    launches: float
    unknown: tuple[str, ...]

    def line(self) -> str:
        """6.40 ms: idle 4.21, matrix products 1.80, ...; host waits 0.20, CUDA calls 3.10; 1240 launches"""
        parts = [("idle", self.idle), *self.kinds.items()]
        parts.sort(key=lambda part: -part[1])
        text = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in parts if seconds > 0)
        host = f"host waits {1e3 * self.waits:.2f}, CUDA calls {1e3 * self.calls:.2f}"
        names = f"; other: {', '.join(name[:60] for name in self.unknown[:3])}" if self.unknown else ""
        return f"{1e3 * self.total:.2f} ms: {text}; {host}; {self.launches:.0f} launches{names}"


def kind_of(kernel: str) -> str | None:
    """None for a name that fits no kind."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)), None)


def split(kernels: Iterable[Span], calls: Iterable[Span] = (), *, steps: int, seconds: float) -> Causes:
    """`seconds`: a step as it was timed, without a profiler, which slows the host and not the kernels; so what they leave
    of it is `idle`, and `total` exceeds it where they were slower than in the timed rounds."""
    ordered = sorted(kernels, key=lambda kernel: kernel[1])
    kinds: dict[str, float] = {}
    unknown: dict[str, float] = {}
    until = float("-inf")
    for name, start, end in ordered:
        kind = kind_of(name)
        own = max(0.0, end - max(start, until))
        until = max(until, end)
        if kind is None:
            unknown[name] = unknown.get(name, 0.0) + own
        kinds[kind or "other"] = kinds.get(kind or "other", 0.0) + own / steps
    busy = sum(kinds.values())
    host = {True: 0.0, False: 0.0}
    for name, start, end in calls:
        host[bool(re.match(WAITS, name))] += (end - start) / steps
    return Causes(
        total=max(seconds, busy),
        kinds=kinds,
        idle=max(0.0, seconds - busy),
        waits=host[True],
        calls=host[False],
        launches=len(ordered) / steps,
        unknown=tuple(sorted(unknown, key=lambda name: -unknown[name])),
    )


def watched(run: Callable[[], None]) -> tuple[list[Span], list[Span]]:
    """The kernels that `run` makes a GPU run, and the calls of CUDA by which it does; `run` need not wait for them.
    RuntimeError when there is no kernel: the profiler is not to be had here."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        run()
    spans: dict[bool, list[Span]] = {True: [], False: []}
    for event in found.events() or ():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu or (re.match(r"cu(da)?[A-Z]", event.name) and not re.match(PROFILER, event.name)):
            spans[on_gpu].append((event.name, event.time_range.start / 1e6, event.time_range.end / 1e6))
    if not spans[True]:
        raise RuntimeError("the profiler saw no kernel: has this process the right to use CUPTI?")
    return spans[True], spans[False]
