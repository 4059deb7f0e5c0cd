"""The errors that a user can cause. Each kind has a class of its own beside the code that raises it."""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable


class GoldengateError(Exception):
    """Something given to goldengate cannot be used: the message is one line that names it and the way out."""


def nearest_names(name: str, known: Iterable[str]) -> list[str]:
    """Up to three of `known` that `name` may have been meant to be, best first."""
    parts = set(name.split("."))
    # Shared parts first, because difflib alone takes 10 s on DeepSeek-V3's 94,000 names.
    alike = heapq.nlargest(100, known, key=lambda other: len(parts.intersection(other.split("."))))
    return difflib.get_close_matches(name, alike)
