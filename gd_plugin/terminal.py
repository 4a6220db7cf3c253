"""The terminal: names of runs, data sets and files on it are other people's text."""

from __future__ import annotations

from collections.abc import Iterable

import rich.console
from rich.segment import Segment

from .markdown import visible

__all__ = ["Console"]


class Console(rich.console.Console):
    """One of rich, in which only rich itself colours text and moves the cursor: rich passes an escape sequence on."""

    def render(self, *args, **kwargs) -> Iterable[Segment]:
        for segment in super().render(*args, **kwargs):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)
