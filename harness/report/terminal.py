"""A report on a terminal: progress, the table, the failures."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from contextlib import AbstractContextManager

from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from harness.report.cells import STYLES, WORDS, Cell, Report, duration, number, worst
from harness.report.console import Console


def _tally(cells: list[Cell], digits: int | None = None) -> Text:
    """`14 ok  1.2e-06`, `3/14 FAIL  2.3e-02`: worst status, how often, and the value that looks worst."""
    status = worst(c.status for c in cells)
    same, ran = [c for c in cells if c.status == status], sum(c.status != "skip" for c in cells)
    text = f"{len(same)}{f'/{ran}' if status in ('fail', 'error') else ''} {WORDS[status]}" if cells else ""
    near = [(c.margin, c.value) for c in same if c.value and c.margin is not None]
    text += f"  {number(max(near)[1], digits)}" if near and digits is not None else ""
    return Text(text, STYLES[status])


def print_table(report: Report, console: Console) -> None:
    """A line per row, a column per check; then every failure, the skips by reason, the summary, the speed."""
    (rows, _, checks), found = report.axes(), defaultdict(list)
    for c in report.cells:
        found[c.row, c.check].append(c)
    for digits in (1, 0, None):  # narrower values, then none, until the table fits
        table = Table("row", *map(escape, checks), box=None, padding=(0, 2, 0, 0))
        for row in rows:
            table.add_row(Text(row), *(_tally(found[row, check], digits) for check in checks))
        if console.measure(table, options=console.options.update(width=999)).maximum <= console.width:
            break
    console.print(table, "")
    for c in (c for status in ("fail", "error") for c in report.cells if c.status == status):
        lines = [f"{c.row}  {c.layout}  {c.check}  {c.says}", *c.detail.splitlines()]
        lines += c.stack.splitlines() if os.environ.get("GOLDENGATE_DEBUG") else []
        console.print(Text.assemble((f"{WORDS[c.status]:6}", STYLES[c.status]), "\n      ".join(lines)))
    for reason, count in Counter(c.detail for c in report.cells if c.status == "skip").most_common():
        console.print(Text(f"{WORDS['skip']:6}{count:,} x {reason}", STYLES["skip"]))
    *counts, (_, seconds) = report.summary().items()
    line = ", ".join(f"{n:,} {status}" for status, n in counts) + f" in {duration(seconds)}"
    console.print(Text(f"{'ok' if report.ok else 'NOT OK'}: {line}", STYLES["pass" if report.ok else "fail"]))
    figures = (f"{k} {f'{v:.3g}' if isinstance(v, float) else v}" for k, v in report.speed.items())
    console.print(Text(f"speed: {', '.join(figures) or 'not measured'}"))


class ProgressPrinter(AbstractContextManager):
    """A bar of rows x layouts on a terminal, elsewhere a line per finished layout (verify goes by layout)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bar = Progress(console=self.console, transient=True, disable=not self.console.is_terminal)
        self.done: list[Cell] = []  # of the layout that is running

    def start(self, total: int) -> None:
        self.task = self.bar.add_task("", total=total)
        self.bar.start()

    def cell(self, cell: Cell) -> None:
        if self.done and self.done[0].layout != cell.layout:
            self._finish_layout()
        new = cell.row not in {c.row for c in self.done}  # the bar counts rows x layouts
        self.bar.update(self.task, advance=new, description=escape(f"{cell.row} {cell.layout}"))
        self.done.append(cell)

    def __exit__(self, *_: object) -> None:
        self._finish_layout()
        self.bar.stop()

    def _finish_layout(self) -> None:
        if self.done and not self.console.is_terminal:
            self.console.print(Text(f"{self.done[0].layout}  ").append(_tally(self.done)))
        self.done = []
