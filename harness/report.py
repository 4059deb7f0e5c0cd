"""What a verification found: cells, the report that holds them, its JSON and its terminal forms.

A cell is one check of one row (toy model) in one layout. The report alone decides whether a run is green, so its
rule is strict: nothing failed, nothing broke, and something was compared. The page is html.py's.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

Status = Literal["fail", "error", "pass", "skip"]  # worst first; a skip is no evidence, so a pass outranks it
STATUSES: tuple[Status, ...] = get_args(Status)
CHECKS = ("config", "complete", "roundtrip", "logits", "grads", "reload", "invert", "flops")
WORDS = {"fail": "FAIL", "error": "ERROR", "pass": "ok", "skip": "skip"}  # a log has no colour
STYLES = {"fail": "bold red", "error": "bold magenta", "pass": "green", "skip": "dim", "none": ""}


def worst(statuses: Iterable[str]) -> str:
    return min(statuses, key=STATUSES.index, default="none")


def number(x: float, digits: int = 1) -> str:
    """`1.2e-06`, `0.25`, `12,345`."""
    if not math.isfinite(x):
        return str(x)
    return f"{x:,.0f}" if x == int(x) else f"{x:,.2f}" if abs(x) >= 0.1 else f"{x:.{digits}e}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


@dataclass(frozen=True)
class Cell:
    """One comparison. `value` passes at or below `limit`; either is None where the check has no such number."""

    row: str
    layout: str
    check: str
    status: Status
    value: float | None
    limit: float | None
    unit: str
    seconds: float
    detail: str

    def __post_init__(self) -> None:
        where = f"cell {self.row} {self.layout} {self.check}"
        if self.status not in STATUSES:
            raise ValueError(f"{where}: unknown status {self.status!r}; write one of {', '.join(STATUSES)}")
        if self.status == "skip" and not self.detail.strip():
            raise ValueError(f"{where}: a skip must say why in detail")
        if self.status == "pass" and self.value is not None and self.limit is not None:
            assert self.value <= self.limit, f"{where}: a pass with {self.says}"  # refuses NaN too

    @property
    def says(self) -> str:
        """`2.3e-02 > 1.0e-04 rel rms`: value, limit and unit as far as they are known."""
        if self.value is None:
            return ""
        against = () if self.limit is None else ("<=" if self.value <= self.limit else ">", number(self.limit))
        return " ".join(filter(None, (number(self.value), *against, self.unit)))

    @property
    def margin(self) -> float | None:
        """log10(value / limit): 0 at the limit, -inf if exact, inf for NaN or a difference where none may be."""
        if self.value is None or self.limit is None:
            return None
        if math.isnan(self.value) or self.value > 0 >= self.limit:
            return math.inf
        return math.log10(self.value / self.limit) if self.value > 0 else -math.inf


@dataclass
class Report:
    """`rows`: dicts of row, model_type, architecture, mechanisms, reference, layouts. `speed`: free-form."""

    rows: list[dict[str, Any]]
    cells: list[Cell]
    environment: dict[str, Any]
    seconds: float
    speed: dict[str, Any] = field(default_factory=dict)

    def axes(self) -> tuple[list[str], list[str], list[str]]:
        """Rows and layouts in order of appearance, planned ones first, and checks in the order of CHECKS."""
        rows = [r["row"] for r in self.rows] + [c.row for c in self.cells]
        layouts = [x for r in self.rows for x in r["layouts"]] + [c.layout for c in self.cells]
        checks = dict.fromkeys(c.check for c in self.cells)
        known = [c for c in CHECKS if c in checks]
        return list(dict.fromkeys(rows)), list(dict.fromkeys(layouts)), list(dict.fromkeys(known + [*checks]))

    def summary(self) -> dict[str, float]:
        count = Counter(c.status for c in self.cells)
        return {s: count[s] for s in ("pass", "fail", "error", "skip")} | {"seconds": self.seconds}

    @property
    def ok(self) -> bool:
        return worst(c.status for c in self.cells) == "pass"  # no cells, or skips alone, compare nothing

    @property
    def exit_code(self) -> int:
        return 0 if self.ok else 1

    @property
    def verdict(self) -> str:
        good, fail, error, *_ = self.summary().values()
        bad = f"{fail + error:,} of {good + fail + error:,} comparisons do not pass"
        return f"all {good:,} comparisons pass" if self.ok else bad if fail + error else "nothing was compared"

    def to_json(self) -> dict[str, Any]:
        """The shape that `verify --json` promises; NaN and infinities as strings, for strict parsers."""
        data = {"rows": self.rows, "cells": [asdict(c) for c in self.cells], "summary": self.summary(),
                "environment": self.environment, "speed": self.speed}
        return json.loads(json.dumps(data), parse_constant=str)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        real = {"value": float, "limit": float, "seconds": float}
        cells = [Cell(**{k: real[k](v) if k in real and v is not None else v for k, v in c.items()})
                 for c in data["cells"]]
        return cls(data["rows"], cells, data["environment"], data["summary"]["seconds"], data.get("speed", {}))

    def save_json(self, path: str | Path) -> None:
        """`-` is standard output."""
        text = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        sys.stdout.write(text) if str(path) == "-" else _write(Path(path), text)

    def save_html(self, path: str | Path) -> None:
        from harness.html import page  # that module reads this one

        _write(Path(path), page(self))


def _write(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of one; a pipe or a device is written in place."""
    part = path if path.exists() and not path.is_file() else path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8", errors="replace")
    if part != path:
        part.replace(path)


def _tally(cells: list[Cell], digits: int | None = None) -> Text:
    """`14 ok  1.2e-06`, `3/14 FAIL  2.3e-02`: worst status, how often, and the value that looks worst."""
    status = worst(c.status for c in cells)
    same, ran = [c for c in cells if c.status == status], sum(c.status != "skip" for c in cells)
    text = f"{len(same)}{f'/{ran}' if status in ('fail', 'error') else ''} {WORDS[status]}" if cells else ""
    near = [(c.margin, c.value) for c in same if c.value and c.margin is not None]
    return Text(text + (f"  {number(max(near)[1], digits)}" if near and digits is not None else ""), STYLES[status])


def _line(c: Cell) -> Text:
    return Text.assemble((f"{WORDS[c.status]:6}", STYLES[c.status]), f"{c.row}  {c.layout}  {c.check}  {c.says}")


def print_table(report: Report, console: Console) -> None:
    """A line per row, a column per check; then every failure, the skips by reason, the summary, the speed."""
    rows, _, checks = report.axes()
    for digits in (1, 0, None):  # narrower values, then none, until the table fits
        table = Table("row", *map(escape, checks), box=None, padding=(0, 2, 0, 0))
        for row in rows:
            of = {k: [c for c in report.cells if (c.row, c.check) == (row, k)] for k in checks}
            table.add_row(Text(row), *(_tally(cells, digits) for cells in of.values()))
        if console.measure(table).maximum <= console.width:
            break
    console.print(table)
    for c in (c for s in ("fail", "error") for c in report.cells if c.status == s):
        console.print(_line(c), Padding(Text(c.detail), (0, 0, 0, 6)))
    for reason, count in Counter(c.detail for c in report.cells if c.status == "skip").most_common():
        console.print(Text(f"{WORDS['skip']:6}{count:,} x {reason}", STYLES["skip"]))
    *counts, (_, seconds) = report.summary().items()
    console.print(Text(report.verdict, STYLES["pass" if report.ok else "fail"]),
                  f"({', '.join(f'{n:,} {s}' for s, n in counts)}; {duration(seconds)})", highlight=False)
    if report.speed:
        console.print(Text("speed " + ", ".join(f"{k} {figure(v)}" for k, v in report.speed.items())))


class ProgressPrinter:
    """A bar of rows x layouts on a terminal; elsewhere a line per finished row. Cells must come row by row."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bar = Progress(console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task, self.row = self.bar.add_task("", total=None), list[Cell]()

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish_row()
        self.bar.stop()

    def start(self, total: int) -> None:
        """`total` = rows x layouts."""
        self.bar.update(self.task, total=total)

    def cell(self, cell: Cell) -> None:
        if self.row and self.row[0].row != cell.row:
            self._finish_row()
        new = cell.layout not in {c.layout for c in self.row}
        self.bar.update(self.task, advance=new, description=escape(f"{cell.row} {cell.layout}"))
        self.row.append(cell)

    def _finish_row(self) -> None:
        if self.row and not self.console.is_terminal:
            self.console.print(Text(f"{self.row[0].row}  ").append(_tally(self.row)))
        self.row = []
