"""Our own tests: the plugin that other repositories use, and how many processes share this machine."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest

pytest_plugins = ["harness.pytest_plugin"]


def pytest_addoption(parser):
    parser.getgroup("goldengate").addoption(
        "--faults",
        action="store_true",
        help="tests/faults: each fault as often as docs/reliability.md says, not a few times",
    )


def pytest_terminal_summary(terminalreporter):
    """Print how often each fault was tried."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, count in report.user_properties:
            if name == "faults" and report.when == "call":
                terminalreporter.write_line(f"{count:6,} times  {report.nodeid.rpartition('::')[2]}: {report.outcome}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Tests share the cores; what measures time, or a GPU, runs alone."""
    alone = config.getoption("--run-gpu") or any("benchmarks" in Path(word).parts for word in config.args)
    if alone:
        return 0
    from harness import workers

    return workers.available()


def pytest_configure(config):
    import torch
    from hypothesis import settings

    torch.set_num_threads(1)  # ranks are forked from this process and need the cores
    settings.register_profile("dev", deadline=None, max_examples=50)
    settings.register_profile("ci", deadline=None, max_examples=200, derandomize=True)
    settings.load_profile("ci" if os.environ.get("CI") else "dev")
