"""Rows shared among processes: the same cells in the same order, and what goes wrong in one."""

import os
import tempfile
from pathlib import Path

import pytest

from bridges import Layout
from harness import workers
from harness.report.cells import Cell
from harness.sweep import verify_rows

ROWS = ["a", "b", "c", "d", "e"]
ORDER = [Layout(), Layout(tp=2), Layout(tp=4)]


def made(row: str, layout: Layout) -> Cell:
    return Cell(row, str(layout), "logits", "pass", 0.0, 1.0, "rel rms", 0.1, tempfile.gettempdir())


def all_of(rows, cell):
    for layout in ORDER:
        for row in rows:
            cell(made(row, layout))


def test_cells_come_by_layout_and_are_sorted_by_row():
    told = []
    found = workers.run(all_of, ROWS, ORDER, 2, told.append)
    assert [(c.layout, c.row) for c in found] == [(str(layout), row) for layout in ORDER for row in ROWS]
    assert [c.layout for c in told] == [c.layout for c in found]
    assert {(c.layout, c.row) for c in told} == {(c.layout, c.row) for c in found}
    assert not Path(found[0].detail).exists(), "the folder for what workers write is gone"


def test_an_exception_of_a_worker_is_raised_and_ends_the_others():
    def breaks(rows, cell):
        cell(made(rows[0], ORDER[0]))
        raise ValueError("golden of a is stale") if "a" in rows else KeyboardInterrupt

    with pytest.raises((ValueError, KeyboardInterrupt)):
        workers.run(breaks, ROWS, ORDER, 2, lambda cell: None)


def test_a_worker_that_dies_is_said():
    def dies(rows, cell):
        os._exit(3)

    with pytest.raises(RuntimeError, match="left with exit code 3, the second one on the rows"):
        workers.run(dies, ROWS, ORDER, 2, lambda cell: None)


def test_shares_hold_every_row_once():
    assert workers.share(ROWS, 2) == [["a", "c", "e"], ["b", "d"]]
    assert workers.share(ROWS, 8) == [[row] for row in ROWS]


def test_two_processes_find_what_one_does():
    """On real rows, a bridge under test among them."""
    rows, options = ["llama2", "qwen2"], {"which": ["tp2-sp", "tp1"], "checks": ["complete", "roundtrip", "logits"]}
    alone, shared = (verify_rows(rows, processes=n, **options) for n in (1, 2))
    same = [
        [(c.row, c.layout, c.check, c.status, c.value, c.limit) for c in report.cells] for report in (alone, shared)
    ]
    assert same[0] == same[1]
    assert len(shared.cells) == 12
    assert shared.ok
