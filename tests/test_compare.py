"""Relative RMS: what it measures, and that nothing which is no comparison passes."""

import math

import pytest
import torch

from harness.reference.compare import compare, relative_rms

ONES = torch.ones(2, 3, 4)


def test_relative_rms_is_the_error_over_the_expected_size():
    """All of 4 off by 1 is a quarter, one of 16 off by 4 as well; only the size of `expected` counts."""
    assert relative_rms(torch.full((16,), 5.0), torch.full((16,), 4.0)) == 0.25
    assert relative_rms(torch.tensor([8.0] + [4.0] * 15), torch.full((16,), 4.0)) == 0.25
    assert relative_rms(torch.full((16,), 4.0), torch.full((16,), 5.0)) == pytest.approx(0.2)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_relative_rms_does_not_depend_on_the_scale(scale):
    """float32 squares would under- or overflow at these sizes."""
    assert relative_rms(ONES * scale * 1.5, ONES * scale) == pytest.approx(0.5)


def test_relative_rms_sees_differences_below_the_resolution_of_float32_sums():
    """One element of a million off by one part in a thousand."""
    expected = torch.ones(1_000_000)
    actual = expected.clone()
    actual[7] += 1e-3
    assert relative_rms(actual, expected) == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("shape", [(2, 4, 3), (6, 4), (1, 3, 4), (4,), ()])
def test_another_shape_is_refused_also_where_it_would_broadcast(shape):
    with pytest.raises(ValueError, match=r"is not the expected \[2, 3, 4\]"):
        relative_rms(torch.ones(shape), ONES)
    with pytest.raises(ValueError, match=r"is not the expected \[2, 3, 4\]"):
        compare(torch.ones(shape), ONES, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["actual", "expected", "both"])
def test_a_value_that_is_not_finite_never_passes(bad, where):
    """Not even where both sides hold the same one, nor under an infinite limit."""
    actual, expected = ONES.clone(), ONES.clone()
    for name, tensor in (("actual", actual), ("expected", expected)):
        if where in (name, "both"):
            tensor[1, 2, 3] = bad
    result = compare(actual, expected, math.inf)
    assert (result.value, result.ok) == (math.inf, False)
    assert "worst at [1, 2, 3]" in result.detail


def test_an_expected_zero_passes_only_for_zero():
    zeros = torch.zeros(3)
    assert compare(zeros, zeros, 1e-4).ok
    result = compare(torch.tensor([0.0, 1e-20, 0.0]), zeros, 1e-4)
    assert (result.value, result.ok) == (math.inf, False)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 5), (2, 5, 0)])
def test_comparing_nothing_is_a_failure(shape):
    result = compare(torch.ones(shape), torch.ones(shape), 1.0)
    assert not result.ok
    assert "nothing to compare" in result.detail


def test_the_limit_is_included():
    assert compare(ONES * 1.25, ONES, 0.25).ok
    assert not compare(ONES * 1.25, ONES, 0.2499).ok


def test_the_detail_names_the_worst_position_and_counts_the_argmax():
    """Of six rows one has its largest value elsewhere; the worst difference keeps its row's argmax."""
    expected = torch.arange(24.0).reshape(2, 3, 4)
    actual = expected.clone()
    actual[0, 1, 0] = 7.5  # above the row's largest, 7
    actual[1, 2, 3] = 30.0
    result = compare(actual, expected, 1e-4)
    assert result.detail == "max abs 7, argmax agrees at 5 of 6, worst at [1, 2, 3]: 30 where 23 is expected"
    assert "worst" not in compare(actual, actual, 1e-4).detail


def test_tensors_of_any_dtype_compare_in_float64():
    assert compare(torch.tensor(3), torch.tensor(3), 0.0).ok
    assert relative_rms(ONES.bfloat16() * 1.5, ONES) == 0.5
    assert relative_rms(ONES.requires_grad_(), ONES) == 0.0
