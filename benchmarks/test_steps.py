"""Steps of models and of their blocks: seconds, TFLOP/s, fraction of the ceiling, and the roofline beside them."""

import pytest

from harness.bench.cases import CASES
from harness.bench.run import ForwardOnly, measure


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step(case, machine, models, ceiling, fresh_memory, benchmark, keep, explain):
    """Forward, or forward and backward."""
    try:
        result = measure(case, models(case.model), ceiling, benchmark.pedantic, explain)
    except ForwardOnly as reason:
        pytest.skip(f"forward only: {reason}")
    keep(result)
