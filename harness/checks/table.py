"""The checks, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from harness.checks.bf16 import check_bf16
from harness.checks.complete import check_complete
from harness.checks.config import check_config
from harness.checks.flops import check_flops
from harness.checks.grads import check_grads
from harness.checks.logits import check_logits
from harness.checks.outcome import Outcome
from harness.checks.reload import check_reload
from harness.checks.roundtrip import check_roundtrip
from harness.checks.subject import Bench

CHECKS = ("config", "complete", "roundtrip", "logits", "reload", "grads")

# `flops` and `bf16` run when they are asked for: tests do, on the CPU the one, on a GPU the other.
FUNCTIONS: dict[str, Callable[[Bench], Outcome]] = {
    "config": check_config,
    "complete": check_complete,
    "roundtrip": check_roundtrip,
    "logits": check_logits,
    "reload": check_reload,
    "grads": check_grads,
    "flops": check_flops,
    "bf16": check_bf16,
}
