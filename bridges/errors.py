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


def near_miss(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` of which `name` may be a misspelling. Another number in it makes it another name: Gemma2 is no
    misspelling of Qwen2, nor DeepseekV32 of DeepseekV3."""

    def digits(text: str) -> list[str]:
        return [character for character in text if character.isdigit()]

    same = [other for other in known if digits(other) == digits(name)]
    return next(iter(difflib.get_close_matches(name, same, n=1, cutoff=0.9)), None)
