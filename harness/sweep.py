"""Run cells and report them: rows x layouts x checks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import toy_models
from bridges import Layout, LayoutError, MegatronModelBridge
from bridges.providers import cpu_substitutions
from harness import layouts, workers
from harness import targets as targets_
from harness.checks.outcome import NotApplicable, Outcome
from harness.checks.subject import Bench, Subject
from harness.checks.table import CHECKS, FUNCTIONS
from harness.mechanisms import mechanisms, provider_of
from harness.quiet import noise, quiet
from harness.ranks import jobs
from harness.ranks.pool import RankError, Ranks
from harness.report.cells import Cell, Report
from harness.targets import Given

LIBRARIES = ("goldengate", "torch", "transformers", "megatron-core", "safetensors", "numpy")


def verify(
    row: Given | Sequence[str],
    *,
    bridge: type[MegatronModelBridge] | None = None,
    layouts: str | Sequence[str] = "quick",
    checks: Iterable[str] | None = None,
    folder: str | Path | None = None,
    trust_remote_code: bool | None = None,
    **options: Any,
) -> Report:
    """Check a row, or the model of a config (a dict or a file), of a checkpoint folder or of a hub id, by a toy of it; or
    several of these.

    `bridge` may be any MegatronModelBridge subclass, `folder` any checkpoint of the row's model: so a bridge or a
    checkpoint, or a deliberately broken one, can be tried without touching a file. For further options see `verify_rows`.
    """
    several = isinstance(row, Sequence) and not isinstance(row, str)
    given = list(row) if several else [row]  # type: ignore[arg-type, list-item]
    targets = [targets_.resolve(one, bridge=bridge, trust_remote_code=trust_remote_code) for one in given]  # type: ignore[arg-type]
    with targets_.as_rows(targets) as rows:
        report = verify_rows(rows, bridge=bridge, which=layouts, checks=checks, folder=folder, **options)
    return report


def verify_rows(
    rows: Sequence[str],
    *,
    which: str | Sequence[str] = "quick",
    checks: Iterable[str] | None = None,
    bridge: type[MegatronModelBridge] | None = None,
    folder: str | Path | None = None,
    started: Callable[[int], None] = lambda total: None,
    cell: Callable[[Cell], None] = lambda cell: None,
    ranks: Ranks | None = None,
    processes: int = 1,
) -> Report:
    """Check rows in layouts. Layout by layout, so that process groups are made once for all rows. `processes` share the rows
    on a CPU; ranks on GPUs take turns.

    Raises ValueError for an unknown row, check or layout, and for a golden that is missing or stale.
    """
    begin = time.perf_counter()
    wanted = tuple(CHECKS if checks is None else checks)
    for name in wanted:
        if name not in FUNCTIONS:
            raise ValueError(f"check {name!r} is not known; checks are {', '.join(FUNCTIONS)}")
    if bridge is not None and torch.cuda.is_available():
        raise ValueError(
            "with a GPU ranks are new processes, which know registered bridges alone: register the bridge, or hide the "
            "GPUs (CUDA_VISIBLE_DEVICES=) and try it out on the CPU"
        )
    chosen = {row: layouts_of(row, which, bridge) for row in rows}
    order = list(dict.fromkeys(layout for found in chosen.values() for layout in found))
    order.sort(key=lambda layout: (layout.world_size, layout.pp, layout.ep))
    started(sum(map(len, chosen.values())))

    def share(rows: Sequence[str], cell: Callable[[Cell], None]) -> list[Cell]:
        return _cells(rows, chosen, order, wanted, bridge=bridge, folder=folder, cell=cell, ranks=ranks)

    with _at_work():
        alone = min(processes, len(rows)) < 2 or ranks is not None or torch.cuda.is_available()
        cells = share(rows, cell) if alone else workers.run(share, rows, order, processes, cell)
    return Report(
        rows=[describe(row, chosen[row], bridge) for row in rows],
        cells=cells,
        environment=environment(),
        seconds=time.perf_counter() - begin,
        speed=speed(cells),
    )


@contextmanager
def _at_work() -> Iterator[None]:
    """The caller's process as ranks want to find it at their fork, and as it was when they are done: quiet, the CPU in the
    place of CUDA, one thread."""
    restore_noise, threads = noise(), torch.get_num_threads()
    try:
        with cpu_substitutions.installed():
            quiet()
            torch.set_num_threads(1)  # the ranks need the cores, and a forked pool of threads would hang
            yield
    finally:
        torch.set_num_threads(threads)
        restore_noise()


def _cells(
    rows: Sequence[str],
    chosen: dict[str, list[Layout]],
    order: Sequence[Layout],
    wanted: Sequence[str],
    *,
    bridge: type[MegatronModelBridge] | None,
    folder: str | Path | None,
    cell: Callable[[Cell], None],
    ranks: Ranks | None,
) -> list[Cell]:
    """The cells of `verify_rows`, in this process."""
    own_ranks = ranks is None or bridge is not None  # a bridge under test reaches the ranks by being there at the fork
    ranks = Ranks() if own_ranks else ranks
    assert ranks is not None
    scratch = Path(tempfile.mkdtemp(prefix="goldengate-"))
    cells: list[Cell] = []
    try:
        subjects = {}
        for row in rows:
            subject = Subject.make(row, scratch / row, bridge)
            if folder is not None:
                subject.folder = Path(folder)
            if subject.bridge_key and bridge:
                jobs.INHERITED_BRIDGES[subject.bridge_key] = bridge
            subjects[row] = subject
        for layout in order:
            for row in rows:
                if layout in chosen[row]:
                    first = not any(c.row == row for c in cells)
                    todo = [c for c in wanted if c != "config" or first]
                    found = run_cells(Bench(subjects[row], layout, ranks, scratch, todo), todo)
                    cells += found
                    for one in found:
                        cell(one)
    finally:
        if own_ranks:
            ranks.close()
        shutil.rmtree(scratch, ignore_errors=True)
    return cells


def run_cells(bench: Bench, checks: Sequence[str]) -> list[Cell]:
    """The cells of a row in a layout."""
    row, layout = bench.subject.row, str(bench.layout)
    begin = time.perf_counter()

    def made(check: str, outcome: Outcome, took: float) -> Cell:
        return Cell(
            row,
            layout,
            check,
            "pass" if outcome.ok else "fail",
            outcome.value,
            outcome.limit,
            outcome.unit,
            took,
            outcome.detail,
        )

    def broken(check: str, error: Exception, took: float) -> Cell:
        return Cell(
            row,
            layout,
            check,
            "error",
            None,
            None,
            "",
            took,
            f"{type(error).__name__}: {error}" if not isinstance(error, RankError) else str(error),
            error.stack if isinstance(error, RankError) else "".join(traceback.format_exception(error)),
        )

    try:
        bench.check_possible()
        on_ranks = [c for c in checks if c != "config"]
        if on_ranks:
            bench.build()
    except LayoutError as impossible:
        return [Cell(row, layout, c, "skip", None, None, "", 0.0, str(impossible)) for c in checks]
    except Exception as error:
        took = time.perf_counter() - begin
        return [broken(c, error, took) for c in checks]
    took = time.perf_counter() - begin  # building and importing count towards the first check
    cells = []
    lost: RankError | None = None  # ended the ranks that held the model
    for check in checks:
        start = time.perf_counter()
        if lost and check in on_ranks:
            try:
                bench.build()
            except Exception as error:
                cells.append(broken(check, RankError(f"not run: {lost}; and then {error}"), took))
                continue
            lost = None
        try:
            outcome = FUNCTIONS[check](bench)
        except NotApplicable as reason:
            cells.append(Cell(row, layout, check, "skip", None, None, "", took, str(reason)))
        except Exception as error:
            lost = error if isinstance(error, RankError) else lost
            cells.append(broken(check, error, took + time.perf_counter() - start))
        else:
            cells.append(made(check, outcome, took + time.perf_counter() - start))
        took = 0.0
    return cells


def layouts_of(row: str, which: str | Sequence[str], bridge: type[MegatronModelBridge] | None = None) -> list[Layout]:
    """Return `quick`, `full`, `gpu` or layouts by name, for what the row's provider has."""
    names = which if isinstance(which, str) else list(which)
    provider = provider_of(row, bridge)
    return layouts.choose(names, experts=bool(provider.num_moe_experts), heads=bool(provider.mtp_num_layers))


def describe(row: str, chosen: Sequence[Layout], bridge: type[MegatronModelBridge] | None = None) -> dict:
    config = toy_models.config_dict(row)
    published, native = config["architectures"][0], toy_models.reference_class(row)
    live = "live: " if toy_models.is_guest(row) else ""
    alias = "" if native == published else f" for {published}, which transformers does not have"
    return {
        "row": row,
        "model_type": config["model_type"],
        "architecture": config["architectures"][0],
        "mechanisms": mechanisms(provider_of(row, bridge)),
        "reference": f"{live}transformers {native}, fp32, eager{alias}",
        **({"toy": config} if live else {}),
        "layouts": [str(layout) for layout in chosen],
    }


def _version(library: str) -> str:
    """What is unknown must not cost the cells that have run."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "unknown (no distribution metadata)"


def environment() -> dict:
    return {
        **{name: _version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count(),
    }


def speed(cells: Sequence[Cell]) -> dict:
    """Median seconds of one cell by number of ranks, as long as it took beside what else ran."""
    per_cell: dict[int, list[float]] = {}
    for one in cells:
        if one.status != "skip":
            per_cell.setdefault(Layout.parse(one.layout).world_size, []).append(one.seconds)
    return {f"{n}-rank cell, median s": round(statistics.median(times), 3) for n, times in sorted(per_cell.items())}
