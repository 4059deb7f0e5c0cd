"""Clocks, and what the device reaches at its best: a large matrix product and a large copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# The timing loop is part of what a number means, and of the case's hash.
LOOP = "a round runs all input sets back to back and waits once; CUDA events on a GPU, the wall clock on a CPU"


class Clock:
    """Measures rounds: `seconds` of each, divided by the `steps` in it."""

    def __init__(self, device: torch.device, steps: int, step: Callable[[int], None], between: Callable[[], None]):
        self.gpu = device.type == "cuda"
        self.steps, self.step, self.between = steps, step, between
        self.seconds: list[float] = []

    def round(self) -> None:
        if self.gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.run()
            end.record()
            end.synchronize()
            self.seconds.append(start.elapsed_time(end) / 1e3 / self.steps)
        else:
            began = time.perf_counter()
            self.run()
            self.seconds.append((time.perf_counter() - began) / self.steps)

    def run(self) -> None:
        """The steps of a round, which are not waited for."""
        for i in range(self.steps):
            self.step(i)
            self.between()


def median_seconds(device: torch.device, step: Callable[[int], object], *, steps: int, rounds: int) -> float:
    """The median round of `step`, after two to warm up."""
    clock = Clock(device, steps, lambda i: (step(i), None)[1], lambda: None)
    for _ in range(rounds + 2):
        clock.round()
    return statistics.median(clock.seconds[2:])


@dataclass(frozen=True)
class Ceiling:
    """What this device reaches now: FLOP/s of a square matrix product, bytes/s of a copy (read and written), and those of a
    copy in main memory."""

    matmul_size: int
    matmul_dtype: str
    flops_per_s: float
    bytes_per_s: float
    host_bytes_per_s: float


def ceiling(device: torch.device) -> Ceiling:
    """8192-cubed in bf16 and a copy of 2 GiB on a GPU, 512-cubed in fp32 and 64 MiB on a CPU."""
    gpu = device.type == "cuda"
    size, dtype, copied = (8192, torch.bfloat16, 2 << 30) if gpu else (512, torch.float32, 64 << 20)
    # Random numbers: zeros take less power, so the clock would be higher than any real product's.
    pairs = [[torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)] for _ in range(2)]
    out = torch.empty(size, size, device=device, dtype=dtype)
    product = median_seconds(device, lambda i: torch.mm(*pairs[i % 2], out=out), steps=8, rounds=10)
    on_device = _copy_rate(device, copied)
    host = _copy_rate(torch.device("cpu"), copied) if gpu else on_device
    return Ceiling(size, str(dtype).removeprefix("torch."), 2 * size**3 / product, on_device, host)


def _copy_rate(device: torch.device, size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / median_seconds(device, lambda i: target.copy_(source), steps=2, rounds=5)


def roofline(work: float, moved: float, at: Ceiling) -> dict[str, float]:
    """Seconds that `work` FLOPs and `moved` bytes take: each alone at its ceiling, the longer of the two (`seconds`: all
    overlaps perfectly), and both one after the other (`serial_seconds`: nothing overlaps)."""
    compute, memory = work / at.flops_per_s, moved / at.bytes_per_s
    return {
        "compute_seconds": compute,
        "memory_seconds": memory,
        "seconds": max(compute, memory),
        "serial_seconds": compute + memory,
    }
