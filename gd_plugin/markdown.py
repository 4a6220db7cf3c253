"""Other people's text, in Markdown and elsewhere: names of labels, methods and data sets come from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["code", "one_line", "plain", "table", "visible"]


# What moves a terminal's cursor, colours it, or turns the direction of the text that follows; and half of a character.
_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with a sign in place of every character that is not shown but acts; lines stay lines."""
    return _INVISIBLE.sub("\ufffd", text)


def one_line(text: object) -> str:
    return visible(" ".join(str(text).split()))


def plain(text: object) -> str:
    """The text as it is read, with no cell, tag, formula or link of its own."""
    text = re.sub(r"[\\|`*_\[\]<>&~$]", r"\\\g<0>", one_line(text))
    return text.replace("://", ":\\//").replace("www.", "www\\.")  # an address is a link without any brackets


def code(text: object) -> str:
    """A code span, which no backtick of the text ends."""
    text = one_line(text)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest else f"{fence}{text}{fence}"


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A table of plain cells; those of ``head`` and ``rows`` may be anything."""
    head = list(head)
    lines = [head, *rows]
    text = [f"| {' | '.join(plain(cell) for cell in cells)} |" for cells in lines]
    return "\n".join([text[0], "|---" * len(head) + "|", *text[1:]])
