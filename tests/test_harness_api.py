"""The harness as a library: what DESIGN's contract promises to programs."""

import pytest


def test_verify_is_a_function_of_the_package():
    """`harness.verify(row, ...)` checks one row and gives a report with a cell for each check that ran."""
    from harness import verify

    report = verify("llama2", layouts=["tp1"], checks=["config", "logits"])
    assert report.ok
    assert [(c.row, c.layout, c.check) for c in report.cells] == [
        ("llama2", "tp1", "config"),
        ("llama2", "tp1", "logits"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"row": "llama9"}, "llama9"),
        ({"row": "llama2", "checks": ["logit"]}, "check 'logit' is not known"),
        ({"row": "llama2", "layouts": ["tp2-qp2"]}, "cannot read 'qp2'"),
    ],
)
def test_a_wrong_word_is_an_error_that_names_it(arguments, message):
    """An unknown row, check or layout is named before anything runs."""
    from harness import verify

    with pytest.raises(ValueError, match=message):
        verify(**arguments)
