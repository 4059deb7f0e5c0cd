"""goldengate in pytest: options, and every cell of every row as a test.

A repository of bridges has a file of tests with one line,

    from harness.pytest_plugin import test_cell

and a [tool.goldengate] in its pyproject.toml (harness.project). Then `pytest`, `pytest --row ROW --layouts full`,
`pytest -k 'ROW and ep2'` and `pytest --run-gpu` run its cells. Nothing is imported before a test asks for it: pytest loads this
file wherever goldengate is installed.
"""

from __future__ import annotations

import os

import pytest

MARK = "goldengate_cell"


def pytest_addoption(parser):
    group = parser.getgroup("goldengate")
    group.addoption("--row", action="append", default=[], help="only these rows (repeat, or separate by commas)")
    group.addoption("--layouts", action="append", default=[], help="quick (default), full, or layouts by name")
    group.addoption("--run-gpu", action="store_true", help="run the cells on GPUs: Transformer Engine modules, NCCL")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs on GPUs too, and with --run-gpu nothing else does")
    config.addinivalue_line("markers", f"{MARK}: takes row, layout and check, and runs for every cell")
    if config.getoption("--run-gpu"):
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking must not start CUDA
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--run-gpu: torch sees no GPU here")


def pytest_collection_modifyitems(config, items):
    """With --run-gpu the cells run on GPUs; the other tests are about this machine's CPU, or about no machine."""
    if config.getoption("--run-gpu"):
        config.hook.pytest_deselected(items=[item for item in items if "gpu" not in item.keywords])
        items[:] = [item for item in items if "gpu" in item.keywords]


def pytest_generate_tests(metafunc):
    """Tests with the mark run for every cell, with ids like qwen3_moe-ep2-logits."""
    if metafunc.definition.get_closest_marker(MARK) is None:
        return
    from harness import project
    from harness.checks.table import CHECKS
    from harness.sweep import layouts_of

    config = metafunc.config
    if found := project.find(config.rootpath):
        found.activate()
    gpu = config.getoption("--run-gpu")
    which = _words(config.getoption("--layouts")) or ["gpu" if gpu else "quick"]
    checks = (*CHECKS, "bf16" if gpu else "flops")
    once = ("config", "flops")  # the same in every layout, or (flops) proven for some in tests/test_flops_proof.py
    cells = [
        (row, layout, check)
        for row in _rows(_words(config.getoption("--row")))
        for n, layout in enumerate(layouts_of(row, which))
        for check in checks
        if check not in once or n == 0
    ]
    cells.sort(key=lambda c: (c[1].world_size, str(c[1])))  # one layout after the other: process groups are kept
    metafunc.parametrize(("row", "layout", "check"), cells, ids=[f"{r}-{layout}-{c}" for r, layout, c in cells])


def _words(values):
    return [word for value in values for word in value.split(",") if word]


def _rows(named):
    """The rows that are named, which must exist; else those of the user's repository; in ours all."""
    import toy_models

    rows = named or toy_models.further_rows() or toy_models.rows()
    for row in rows:
        toy_models.config_dict(row)
    return rows


@pytest.fixture(scope="session")
def ranks():
    """Pools of forked ranks, shared by all tests of the session."""
    import torch

    from bridges.providers import cpu_substitutions
    from harness.quiet import quiet
    from harness.ranks.pool import Ranks

    quiet()
    torch.set_num_threads(1)  # ranks are forked from this process and need the cores
    if not torch.cuda.is_available():
        cpu_substitutions.install()
    with Ranks() as pools:
        yield pools


@pytest.fixture(scope="session")
def goldengate_subjects(tmp_path_factory):
    """Rows with their checkpoints, written once."""
    from harness.checks.subject import Subject

    made: dict[str, Subject] = {}

    def make(row: str) -> Subject:
        if row not in made:
            made[row] = Subject.make(row, tmp_path_factory.mktemp(row.replace(".", "_")))
        return made[row]

    return make


@pytest.fixture(scope="session")
def goldengate_bench(goldengate_subjects, ranks, tmp_path_factory):
    """The row in the layout, built on ranks; kept for the next check of the same two."""
    from bridges import LayoutError
    from harness.checks.subject import Bench
    from harness.checks.table import CHECKS

    latest: list[Bench] = []

    def make(row: str, layout) -> Bench:
        if not latest or (latest[0].subject.row, latest[0].layout) != (row, layout):
            latest.clear()
            new = Bench(goldengate_subjects(row), layout, ranks, tmp_path_factory.mktemp("exports"), CHECKS)
            try:
                new.check_possible()
            except LayoutError as impossible:
                pytest.skip(str(impossible))
            new.build()
            latest.append(new)
        return latest[0]

    return make


@pytest.mark.gpu
@pytest.mark.goldengate_cell
def test_cell(row, layout, check, goldengate_bench, record_property):
    """The check passes: its value is within its limit. `--junitxml` keeps both."""
    from harness.checks.outcome import NotApplicable
    from harness.checks.table import FUNCTIONS

    try:
        outcome = FUNCTIONS[check](goldengate_bench(row, layout))
    except NotApplicable as reason:
        pytest.skip(str(reason))
    record_property("value", outcome.value)
    record_property("limit", outcome.limit)
    assert outcome.ok, f"{outcome.value} against {outcome.limit} {outcome.unit}: {outcome.detail}"
