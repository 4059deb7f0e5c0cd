"""What `goldengate bench` prints."""

from __future__ import annotations

from collections import Counter
from typing import Any

from harness.bench.verdict import Verdict


def exit_code(verdicts: list[Verdict]) -> int:
    """1 when a case got slower, and when nothing could be compared: that is no good news either."""
    outcomes = Counter(v.outcome for v in verdicts)
    return 1 if outcomes["slower"] or len(verdicts) == outcomes["not comparable"] else 0


def table(verdicts: list[Verdict]) -> Any:
    """A rich table, a line a case."""
    from rich.table import Table

    lines = Table("case", "A ms", "B ms", "verdict", "why", box=None)
    for v in verdicts:
        times = [f"{1e3 * s:.4g}" if s is not None else "" for s in (v.a_seconds, v.b_seconds)]
        lines.add_row(v.case, *times, v.outcome, v.reason)
    return lines
