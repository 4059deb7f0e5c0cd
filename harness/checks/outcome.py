"""What a check answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class NotApplicable(Exception):
    """A check has no meaning for this row in this layout; the message says why. The cell is skipped."""


@dataclass(frozen=True)
class Outcome:
    """`ok`, the number compared with its limit, and a line that says what differed (or what was counted)."""

    ok: bool
    value: float | None
    limit: float | None
    unit: str
    detail: str


def first_few(lines: Sequence[str], most: int = 4) -> str:
    """The first `most` of what is wrong and how many more there are; empty for nothing."""
    return "; ".join(lines[:most]) + (f" (and {len(lines) - most} more)" if len(lines) > most else "")
