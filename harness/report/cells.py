"""What a verification found: cells, and the report of them as JSON and in a terminal (as a page: html.py).

A cell is one check of one row (toy model) in one layout. Green means: none failed or broke, and some passed.
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

Status = Literal["fail", "error", "pass", "skip"]  # worst first; a skip is no evidence, so a pass outranks it


STATUSES: tuple[Status, ...] = get_args(Status)


WORDS = {"fail": "FAIL", "error": "ERROR", "pass": "ok", "skip": "skip"}  # a log has no colour


STYLES = {"fail": "bold red", "error": "bold magenta", "pass": "green", "skip": "dim", "none": ""}


def worst(statuses: Iterable[str]) -> str:
    return min(statuses, key=STATUSES.index, default="none")


def number(x: float, digits: int = 1) -> str:
    """`1.2e-06`, `0.25`, `12,345`."""
    plain = x == 0 or 0.1 <= abs(x) < 1e6
    return f"{x:.{digits}e}" if not plain else f"{x:,.0f}" if x % 1 == 0 else f"{x:,.2f}"


def duration(seconds: float) -> str:
    return f"{seconds:.{1 if seconds >= 10 else 2}f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


@dataclass(frozen=True)
class Cell:
    """One comparison. A `value` passes at or below its `limit`; None where the check has no such number."""

    row: str
    layout: str
    check: str
    status: Status
    value: float | None
    limit: float | None
    unit: str
    seconds: float
    detail: str
    stack: str = ""  # of an error: where it was raised, on every rank that failed

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
        limit = [] if self.limit is None else ["<=" if self.value <= self.limit else ">", number(self.limit)]
        return " ".join([number(self.value), *limit, self.unit]).rstrip()

    @property
    def margin(self) -> float | None:
        """log10(value / limit): 0 at the limit, -inf if exact, inf for NaN or a difference from exact."""
        if self.value is None or self.limit is None:
            return None
        if math.isnan(self.value) or self.value > 0 >= self.limit:
            return math.inf
        return math.log10(self.value) - math.log10(self.limit) if self.value > 0 else -math.inf


@dataclass
class Report:
    """`rows`: dicts of row, model_type, architecture, mechanisms, reference, layouts. `speed`: free-form."""

    rows: list[dict[str, Any]]
    cells: list[Cell]
    environment: dict[str, Any]
    seconds: float
    speed: dict[str, Any] = field(default_factory=dict)

    def axes(self) -> tuple[list[str], list[str], list[str]]:
        """Names of rows, layouts and checks in order of appearance, planned ones first."""
        rows = dict.fromkeys([*(r["row"] for r in self.rows), *(c.row for c in self.cells)])
        layouts = [*(x for r in self.rows for x in r["layouts"]), *(c.layout for c in self.cells)]
        return list(rows), list(dict.fromkeys(layouts)), list(dict.fromkeys(c.check for c in self.cells))

    def summary(self) -> dict[str, float]:
        count = Counter(c.status for c in self.cells)
        return {s: count[s] for s in ("pass", "fail", "error", "skip")} | {"seconds": self.seconds}

    @property
    def ok(self) -> bool:
        return worst(c.status for c in self.cells) == "pass"  # no cells, or skips alone, compare nothing

    @property
    def exit_code(self) -> int:
        return 0 if self.ok else 1

    def to_json(self) -> dict[str, Any]:
        """The shape that `verify --json` promises; NaN and infinities as strings, for strict parsers."""
        data = {
            "rows": self.rows,
            "cells": [{k: v for k, v in asdict(c).items() if k != "stack" or v} for c in self.cells],
            "summary": self.summary(),
            "environment": self.environment,
            "speed": self.speed,
        }
        return json.loads(json.dumps(data), parse_constant=str)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        cells = [Cell(**c | {k: c[k] and float(c[k]) for k in ("value", "limit")}) for c in data["cells"]]
        return cls(data["rows"], cells, data["environment"], data["summary"]["seconds"], data["speed"])

    def save_json(self, path: str | Path) -> None:
        """`-` is standard output."""
        text = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        sys.stdout.write(text) if str(path) == "-" else _write(Path(path), text)

    def save_html(self, path: str | Path) -> None:
        from harness.report.page import page  # that module reads this one

        _write(Path(path), page(self))


def _write(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of one; a pipe or device is written in place."""
    part = path if path.exists() and not path.is_file() else path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8", errors="replace")
    part.replace(path)  # onto itself: nothing
