"""Every row in every chosen layout: `pytest -k 'qwen3_moe and ep2'`, `pytest --row phi3 --layouts full`."""

import pytest

from bridges import LayoutError
from harness.checks.outcome import NotApplicable
from harness.checks.subject import Bench, Subject
from harness.checks.table import CHECKS, FUNCTIONS


@pytest.fixture(scope="session")
def subjects(tmp_path_factory):
    """Rows with their checkpoints, written once."""
    made: dict[str, Subject] = {}

    def make(row: str) -> Subject:
        if row not in made:
            made[row] = Subject.make(row, tmp_path_factory.mktemp(row.replace(".", "_")))
        return made[row]

    return make


@pytest.fixture(scope="session")
def bench(subjects, ranks, tmp_path_factory):
    """The row in the layout, built on ranks; kept for the next check of the same two."""
    latest: list[Bench] = []

    def make(row: str, layout) -> Bench:
        if not latest or (latest[0].subject.row, latest[0].layout) != (row, layout):
            latest.clear()
            new = Bench(subjects(row), layout, ranks, tmp_path_factory.mktemp("exports"), CHECKS)
            try:
                new.check_possible()
            except LayoutError as impossible:
                pytest.skip(str(impossible))
            new.build()
            latest.append(new)
        return latest[0]

    return make


@pytest.mark.gpu
def test_cell(row, layout, check, bench, record_property):
    """The check passes: its value is within its limit. `--junitxml` keeps both."""
    try:
        outcome = FUNCTIONS[check](bench(row, layout))
    except NotApplicable as reason:
        pytest.skip(str(reason))
    record_property("value", outcome.value)
    record_property("limit", outcome.limit)
    assert outcome.ok, f"{outcome.value} against {outcome.limit} {outcome.unit}: {outcome.detail}"
