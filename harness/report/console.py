"""Where lines are printed, and nothing in them speaks to the terminal: names come from files and may hold escape sequences."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console as _Console
from rich.segment import Segment

# C0 but newline and tab, DEL, C1, and what turns the direction of writing.
_SPEAKS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return the text with control characters spelled out, `\\x1b` for an escape."""
    return _SPEAKS.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


class Console(_Console):
    """rich's console, which writes the text of every segment through `printable`; its own control codes pass."""

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        return super()._render_buffer(s if s.control else Segment(printable(s.text), s.style) for s in buffer)
