"""Options and fixtures of `pytest benchmarks`. The ledger is written only with --ledger."""

import datetime
import gc
import logging
import os
import uuid
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest

CAUSES = pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("goldengate benchmarks")
    group.addoption("--ledger", metavar="DIR", help="append the results to DIR/<device>.jsonl")
    group.addoption("--label", help="a word for this run, to compare and plot by")
    group.addoption("--commit", help="the commit that runs, where the tree has no .git")
    group.addoption("--unfused", action="store_true", help="without the fused kernels of the GPU cases")
    group.addoption("--causes", action="store_true", help="say where a GPU's time went, by kind of kernel")


def pytest_configure(config):
    if config.getoption("--causes"):
        import torch

        if config.getoption("--ledger"):
            raise pytest.UsageError("--causes with --ledger: the profiler slows launches down; run them one by one")
        if not torch.cuda.is_available():
            raise pytest.UsageError("--causes: torch sees no GPU here, and kernels are a GPU's")


@pytest.fixture(scope="session")
def machine(request):
    import torch

    from harness.bench.subject import Machine

    warnings.filterwarnings("ignore")
    for name in ("megatron", "transformers", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    here = Machine.here(fused=not request.config.getoption("--unfused"))
    if not here.toy:
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # the tests of ranks want one
    return here


@pytest.fixture(scope="session")
def ceiling(machine):
    from harness.bench.measure import ceiling

    return ceiling(machine.device)


@pytest.fixture(scope="session")
def models(machine):
    """One model at a time: the cases of a model follow each other."""
    from harness.bench.subject import build

    held = {}

    def get(model):
        if model.name not in held:
            held.clear()
            _reset_memory(machine)
            held[model.name] = build(model, machine)
        return held[model.name]

    yield get
    held.clear()
    _reset_memory(machine)


def _reset_memory(machine):
    import torch

    if not machine.toy:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@pytest.fixture
def fresh_memory(machine):
    _reset_memory(machine)


@pytest.fixture(scope="session")
def surroundings(request, ceiling):
    """What all lines of this process have in common."""
    from harness.bench import environment

    commit, dirty = environment.commit()
    if given := request.config.getoption("--commit"):
        if commit not in ("unknown", given):
            raise pytest.UsageError(f"--commit {given}, but this tree is at {commit}")
        commit = given
    return {
        "process": uuid.uuid4().hex,
        "commit": commit,
        "dirty": dirty,
        "label": request.config.getoption("--label"),
        "device": environment.device(),
        "versions": environment.versions(),
        "ceiling": asdict(ceiling),
    }


@pytest.fixture
def keep(request, surroundings, benchmark):
    """Gives pytest-benchmark the numbers of a case, and the ledger where one was asked for."""
    from harness.bench import ledger

    def keep(result):
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = ledger.sealed({"time_utc": now, **surroundings, **result})
        assert ledger.problem(record) is None, ledger.problem(record)
        benchmark.extra_info.update(record)
        if folder := request.config.getoption("--ledger"):
            ledger.append(Path(folder), record)

    return keep


@pytest.fixture
def explain(request):
    """Keeps the causes of a case for the summary, where they were asked for."""
    if not request.config.getoption("--causes"):
        return None
    found = request.config.stash.setdefault(CAUSES, {})
    return lambda causes: found.update({request.node.callspec.id: causes})


def pytest_terminal_summary(terminalreporter):
    """A line a case: pytest-benchmark's own table knows time alone."""
    if found := terminalreporter.config.stash.get(CAUSES, {}):
        terminalreporter.section("where the time of a step goes")
        for case, causes in found.items():
            terminalreporter.write_line(f"{case:32} {causes.line()}")
    lines = []
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    for bench in session.benchmarks if session else ():
        r = bench.extra_info
        if "case" not in r:
            continue
        line = f"{r['case']:32} {1e3 * r['median_s']:10.3f} ms"
        if r["tflops"] is not None:
            line += f"  {r['tflops']:8.4g} TFLOP/s  {r['fraction_of_ceiling']:6.1%} of the ceiling"
        if r["bytes_per_s"] is not None:
            line += f"  {r['bytes_per_s'] / 1e9:8.3g} GB/s"
        line += f"  roofline {1e3 * r['roofline']['seconds']:.3f} to {1e3 * r['roofline']['serial_seconds']:.3f} ms"
        lines.append(line)
    if lines:
        top = session.benchmarks[0].extra_info["ceiling"]
        terminalreporter.section("goldengate benchmarks")
        terminalreporter.write_line(
            f"matrix product {top['flops_per_s'] / 1e12:.4g} TFLOP/s, copy {top['bytes_per_s'] / 1e9:.4g} GB/s, "
            f"in main memory {top['host_bytes_per_s'] / 1e9:.4g} GB/s"
        )
        for line in lines:
            terminalreporter.write_line(line)
