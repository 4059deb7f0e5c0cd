"""pytest options and the fixtures that all tests share; the cells themselves are tests/test_cells.py."""

import os
from pathlib import Path

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Tests share the cores; what measures time, or a GPU, runs alone."""
    alone = config.getoption("--run-gpu") or any("benchmarks" in Path(word).parts for word in config.args)
    if alone:
        return 0
    from harness import workers

    return workers.available()


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs on GPUs too, and with --run-gpu nothing else does")
    import torch
    from hypothesis import settings

    import harness  # noqa: F401 - says how to ask for GPUs without starting CUDA

    if config.getoption("--run-gpu") and not torch.cuda.is_available():
        raise pytest.UsageError("--run-gpu: torch sees no GPU here")
    torch.set_num_threads(1)  # ranks are forked from this process and need the cores
    settings.register_profile("dev", deadline=None, max_examples=50)
    settings.register_profile("ci", deadline=None, max_examples=200, derandomize=True)
    settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_modifyitems(config, items):
    """With --run-gpu the cells run on GPUs; the other tests are about this machine's CPU, or about no machine."""
    if config.getoption("--run-gpu"):
        config.hook.pytest_deselected(items=[item for item in items if "gpu" not in item.keywords])
        items[:] = [item for item in items if "gpu" in item.keywords]


def pytest_generate_tests(metafunc):
    """Tests that take `row`, `layout` and `check` run for every cell, with ids like qwen3_moe-ep2-logits."""
    if not {"row", "layout", "check"} <= set(metafunc.fixturenames):
        return
    import toy_models
    from harness.checks.table import CHECKS
    from harness.sweep import layouts_of

    config = metafunc.config
    gpu = config.getoption("--run-gpu")
    which = _words(config.getoption("--layouts")) or ["gpu" if gpu else "quick"]
    checks = (*CHECKS, "bf16" if gpu else "flops")
    once = ("config", "flops")  # the same in every layout, or (flops) proven for some in tests/test_flops_proof.py
    rows = _words(config.getoption("--row")) or toy_models.rows()
    for row in rows:
        toy_models.config_dict(row)
    cells = [
        (row, layout, check)
        for row in rows
        for n, layout in enumerate(layouts_of(row, which))
        for check in checks
        if check not in once or n == 0
    ]
    cells.sort(key=lambda c: (c[1].world_size, str(c[1])))  # one layout after the other: process groups are kept
    metafunc.parametrize(("row", "layout", "check"), cells, ids=[f"{r}-{layout}-{c}" for r, layout, c in cells])


@pytest.fixture(scope="session")
def ranks():
    """Pools of forked ranks, shared by all tests of the session."""
    import torch

    from bridges.providers import cpu_substitutions
    from harness.quiet import quiet
    from harness.ranks.pool import Ranks

    quiet()
    if not torch.cuda.is_available():
        cpu_substitutions.install()
    with Ranks() as pools:
        yield pools
