"""One case from warm-up to a ledger line, less what all lines of a process have in common."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from bridges.errors import GoldengateError
from harness.bench.cases import INPUT_SETS, Case
from harness.bench.causes import Causes, split, watched
from harness.bench.ledger import Record, digest
from harness.bench.measure import LOOP, Ceiling, Clock, roofline
from harness.bench.subject import Built, Subject, selected

ROUNDS = range(3, 21)  # as many as fit into SECONDS; a round of a large model takes almost one
SECONDS = 0.6
TOY_ROUNDS = 3
# What flash-linear-attention says when its backward is not to be trusted on this GPU (its issue 640).
NO_BACKWARD = ("#640", "issues/640", "tilelang")

Runner = Callable[..., Any]  # pytest-benchmark's pedantic


class ForwardOnly(GoldengateError, RuntimeError):
    """The kernels of this machine have no backward; the message is theirs."""


def measure(
    case: Case, built: Built, ceiling: Ceiling, runner: Runner, explain: Callable[[Causes], None] | None = None
) -> Record:
    """Runs the case. ForwardOnly where a kernel refuses its backward. `explain` is given where a GPU's time went."""
    subject = Subject(case, built)
    try:
        subject.warm_up()
    except Exception as error:
        if case.backward and any(word in str(error).lower() for word in NO_BACKWARD):
            raise ForwardOnly(" ".join(str(error).split())) from error
        raise
    device = built.machine.device
    clock = Clock(device, INPUT_SETS, subject.step, subject.forget_gradients)
    clock.round()
    fit = int(SECONDS / (clock.seconds[0] * INPUT_SETS))
    rounds = TOY_ROUNDS if built.machine.toy else min(max(fit, ROUNDS.start), ROUNDS.stop - 1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock.seconds.clear()
    runner(clock.round, rounds=rounds, warmup_rounds=0, iterations=1)
    timing = timed(clock.seconds)
    if explain and device.type == "cuda":
        explain(split(*watched(clock.run), steps=INPUT_SETS, seconds=timing["median_s"]))
    hardware, causal = (selected(case, built.count(c)) for c in ("hardware", "causal"))
    work = sum(hardware.values())
    return {
        **timing,
        **named(case.name, {**built.settings(), "loop": LOOP}),
        "flops": {
            "convention": "hardware",
            "kernels": built.machine.kernels,
            "total": work,
            "by_part": hardware,
            "causal_total": sum(causal.values()),
        },
        "bytes": subject.bytes,
        **rates(work, timing["median_s"], ceiling),
        "bytes_per_s": None,
        "roofline": roofline(work, subject.bytes, ceiling),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def named(case: str, settings: dict[str, Any]) -> Record:
    settings = {"case": case, **settings}
    return {"case": case, "settings": settings, "case_hash": digest(settings)}


def timed(seconds: list[float]) -> Record:
    return {"rounds_s": list(seconds), "median_s": statistics.median(seconds)}


def rates(work: float, seconds: float, ceiling: Ceiling) -> Record:
    """TFLOP/s of one GPU, and what share that is of the matrix product measured in the same process."""
    return {"tflops": work / seconds / 1e12, "fraction_of_ceiling": work / seconds / ceiling.flops_per_s}
