"""Several processes that verify a share of the rows each, so that one's ranks run while another compares."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import shutil
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from bridges import Layout
from bridges.errors import GoldengateError
from harness.processes import Parent, death, keep_private
from harness.report.cells import Cell

Verify = Callable[..., Any]  # verify_rows of a share of the rows, with the callback `cell`


LOOK_S = 1.0  # between two looks whether silent workers live
MOST = 8  # each has up to eight ranks of its own


class WorkerError(GoldengateError, RuntimeError):
    """A worker process was lost, and its rows could not be run by another."""


def available() -> int:
    """How many this machine has cores for."""
    return min(len(os.sched_getaffinity(0)), MOST)


def share(rows: Sequence[str], count: int) -> list[list[str]]:
    """Every count-th row: neighbours, such as a row and its square twin, take about the same time."""
    return [list(rows[i::count]) for i in range(min(count, len(rows)))]


def run(
    verify: Verify, rows: Sequence[str], order: Sequence[Layout], count: int, cell: Callable[[Cell], None]
) -> list[Cell]:
    """The cells of all rows, by layout in the given order, then by row. `cell` gets them layout by layout as they come. The
    rows of a worker that is killed are run once more by a new one.

    Raises what a worker raises, when the others are ended; WorkerError for one whose rows killed two.
    """
    scratch = tempfile.mkdtemp(prefix="goldengate-")
    place = {str(layout): i for i, layout in enumerate(order)}
    working: dict[Connection, _Worker] = {}
    seen: set[tuple[str, str, str]] = set()
    waiting: list[Cell] = []
    found: list[Cell] = []

    def start(mine: list[str], again: bool = False) -> None:
        worker = _Worker(verify, mine, scratch, again)
        working[worker.connection] = worker

    try:
        for mine in share(rows, count):
            start(mine)
        while working:
            for connection, worker in _ready(working):
                try:
                    if not connection.poll():  # dead, and the pipe is held open by a child of its own
                        raise EOFError
                    said = connection.recv()
                except (EOFError, OSError):
                    del working[connection]
                    worker.replace(start)
                    continue
                if isinstance(said, Cell):
                    worker.reached = place[said.layout]
                    if (key := (said.row, said.layout, said.check)) not in seen:  # not from a worker that died since
                        seen.add(key)
                        waiting.append(said)
                elif said is None:
                    working.pop(connection).process.join()
                else:
                    raise said
            now = min((worker.reached for worker in working.values()), default=len(order))
            for one in [one for one in waiting if place[one.layout] <= now]:
                waiting.remove(one)
                found.append(one)
                cell(one)
    finally:
        for worker in working.values():
            worker.process.kill()  # and its ranks with it
            worker.process.join()
        shutil.rmtree(scratch, ignore_errors=True)
    number = {row: i for i, row in enumerate(rows)}
    return sorted(found, key=lambda one: (place[one.layout], number[one.row]))


class _Worker:
    """A process with its share of the rows, as `run` sees it."""

    def __init__(self, verify: Verify, rows: list[str], scratch: str, again: bool):
        context = multiprocessing.get_context("fork")  # workers inherit bridges under test, and all that is imported
        self.rows, self.again, self.reached = rows, again, 0  # reached: the layout that it is at
        self.connection, there = context.Pipe(duplex=False)
        with there:
            keep_private(self.connection)
            self.process = context.Process(target=_work, args=(verify, rows, there, scratch, Parent()))
            self.process.start()

    def replace(self, start: Callable[[list[str], bool], None]) -> None:
        """After its death: give the rows to another, once."""
        self.process.join(5)  # its pipe closes a moment before it has an exit code
        how = f"a worker of verify {death(self.process.exitcode)}"
        if self.again:
            raise WorkerError(f"{how}, the second one on the rows {', '.join(self.rows)}: try them with --processes 1")
        logging.getLogger(__name__).warning("%s; its rows are run once more: %s", how, ", ".join(self.rows))
        start(self.rows, True)


def _ready(working: dict[Connection, _Worker]) -> list[tuple[Connection, _Worker]]:
    """Wait for workers that have something to say or are dead, whoever may hold their pipe open."""
    while True:
        ready = wait(list(working), timeout=LOOK_S)
        found = [(c, w) for c, w in working.items() if c in ready or not w.process.is_alive()]
        if found:
            return found


def _work(verify: Verify, rows: list[str], connection: Connection, scratch: str, parent: Parent) -> None:
    """A worker's life: cells, then None, or the exception that ended it."""
    parent.hold(connection)
    tempfile.tempdir = scratch
    try:
        verify(rows, cell=connection.send)
        connection.send(None)
    except BaseException as error:
        error.add_note(traceback.format_exc())
        try:
            connection.send(error)
        except (TypeError, AttributeError, pickle.PicklingError):  # one that does not pickle
            connection.send(WorkerError(f"{type(error).__name__}: {error}"))
