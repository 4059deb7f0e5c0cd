"""pytest options and the fixtures that all tests share; the cells themselves are tests/test_cells.py."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("goldengate")
    group.addoption("--row", action="append", default=[], help="only these rows (repeat, or separate by commas)")
    group.addoption("--layouts", action="append", default=[], help="quick (default), full, or layouts by name")
    group.addoption("--run-gpu", action="store_true", help="run the cells on GPUs: Transformer Engine modules, NCCL")


def _words(values):
    return [word for value in values for word in value.split(",") if word]


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU; runs with --run-gpu")
    import torch
    from hypothesis import settings

    torch.set_num_threads(1)  # ranks are forked from this process and need the cores
    settings.register_profile("dev", deadline=None, max_examples=50)
    settings.register_profile("ci", deadline=None, max_examples=200, derandomize=True)
    settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--run-gpu"):
        skip = pytest.mark.skip(reason="needs a GPU: run with --run-gpu")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_generate_tests(metafunc):
    """Tests that take `row`, `layout` and `check` run for every cell, with ids like qwen3_moe-ep2-logits."""
    if not {"row", "layout", "check"} <= set(metafunc.fixturenames):
        return
    import toy_models
    from harness.checks import CHECKS
    from harness.layouts import choose
    from harness.sweep import has_experts

    config = metafunc.config
    which = _words(config.getoption("--layouts")) or ["quick"]
    rows = _words(config.getoption("--row")) or toy_models.rows()
    for row in rows:
        toy_models.config_dict(row)
    cells = [
        (row, layout, check)
        for row in rows
        for layout in choose(which, experts=has_experts(row))
        for check in CHECKS
        if check != "config" or layout == choose(which, experts=has_experts(row))[0]
    ]
    cells.sort(key=lambda c: (c[1].world_size, str(c[1])))  # one layout after the other: process groups are kept
    metafunc.parametrize(("row", "layout", "check"), cells, ids=[f"{r}-{layout}-{c}" for r, layout, c in cells])


@pytest.fixture(scope="session")
def ranks():
    """Pools of forked ranks, shared by all tests of the session."""
    import torch

    from bridges import cpu_substitutions
    from harness.ranks import Ranks
    from harness.sweep import quiet

    quiet()
    if not torch.cuda.is_available():
        cpu_substitutions.install()
    with Ranks() as pools:
        yield pools
