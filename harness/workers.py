"""Several processes that verify a share of the rows each, so that one's ranks run while another compares."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from bridges import Layout
from harness.report.cells import Cell

Verify = Callable[..., Any]  # verify_rows of a share of the rows, with the callback `cell`


MOST = 8  # each has up to eight ranks of its own


def available() -> int:
    """How many this machine has cores for."""
    return min(len(os.sched_getaffinity(0)), MOST)


def share(rows: Sequence[str], count: int) -> list[list[str]]:
    """Every count-th row: neighbours, such as a row and its square twin, take about the same time."""
    return [list(rows[i::count]) for i in range(min(count, len(rows)))]


def run(
    verify: Verify, rows: Sequence[str], order: Sequence[Layout], count: int, cell: Callable[[Cell], None]
) -> list[Cell]:
    """The cells of all rows, by layout in the given order, then by row. `cell` gets them layout by layout as they come.

    Raises what a worker raises, when the others are ended; RuntimeError for one that died.
    """
    context = multiprocessing.get_context("fork")  # workers inherit bridges under test, and all that is imported
    scratch = tempfile.mkdtemp(prefix="goldengate-")
    place = {str(layout): i for i, layout in enumerate(order)}
    working: dict[Connection, Any] = {}
    reached: dict[Connection, int] = {}  # the layout that a worker is at
    waiting: list[Cell] = []
    found: list[Cell] = []
    try:
        for mine in share(rows, count):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(verify, mine, there, scratch))
            process.start()
            there.close()
            working[here], reached[here] = process, 0
        while working:
            for connection in wait(list(working)):
                assert isinstance(connection, Connection)
                try:
                    said = connection.recv()
                except EOFError:
                    working[connection].join()
                    raise RuntimeError(
                        f"a worker of verify died with exit code {working[connection].exitcode}"
                    ) from None
                if isinstance(said, Cell):
                    waiting.append(said)
                    reached[connection] = place[said.layout]
                elif said is None:
                    working.pop(connection).join()
                    del reached[connection]
                else:
                    raise said
            now = min(reached.values(), default=len(order))
            for one in [one for one in waiting if place[one.layout] <= now]:
                waiting.remove(one)
                found.append(one)
                cell(one)
    finally:
        for process in working.values():
            process.kill()  # its ranks see their pipes close
            process.join()
        shutil.rmtree(scratch, ignore_errors=True)
    number = {row: i for i, row in enumerate(rows)}
    return sorted(found, key=lambda one: (place[one.layout], number[one.row]))


def _work(verify: Verify, rows: list[str], connection: Connection, scratch: str) -> None:
    """A worker's life: cells, then None, or the exception that ended it."""
    tempfile.tempdir = scratch
    try:
        verify(rows, cell=connection.send)
        connection.send(None)
    except BaseException as error:
        error.add_note(traceback.format_exc())
        connection.send(error)
