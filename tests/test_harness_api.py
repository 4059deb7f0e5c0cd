"""The harness as a library: what DESIGN's contract promises to programs."""

import os
from pathlib import Path

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


@pytest.mark.parametrize(("arguments", "hidden"), [([], True), (["--run-gpu"], False)])
def test_tests_hide_gpus_unless_asked_and_benchmarks_do_not(arguments, hidden, monkeypatch):
    """`pytest` says the same on every machine; a benchmark that silently ran on the CPU would be worse than none."""
    from tests import conftest

    class Config:
        def getoption(self, name):
            return name in arguments

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    conftest.pytest_configure(Config())
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("" if hidden else "3")
    root = (Path(conftest.__file__).parents[1] / "conftest.py").read_text()
    assert "CUDA_VISIBLE_DEVICES" not in root, "the root's conftest is that of benchmarks too"
