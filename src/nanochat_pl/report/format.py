"""Numbers as people read them, and text that nobody vouches for made safe.

Samples, answers and settings come from models, data sets and users: in a report they are text and never markup. Here is
what Markdown, of which the page is made, and any encoding need.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Control characters but tab and line end; lone surrogates; marks that turn the reading direction of what follows.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_MARKDOWN = re.compile(r"([\\`*_\[\]<>#|~&$!]|^[-+=](?!\d))")
# What a text is that stands as it is: in Markdown the language of its code block, in the page its classes.
BLOCKS = frozenset({"user", "assistant", "question", "answer", "right", "wrong", "reference", "text"})


def clean(text: str) -> str:
    """Text with nothing in it that cannot be encoded or that a reader would not see."""
    return _UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n"))


def markdown_inline(value: Any) -> str:
    """One line of plain text for Markdown, also inside a table, and where its beginning would make a list of it."""
    line = _MARKDOWN.sub(r"\\\1", " ".join(clean(str(value)).split()))
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)


def markdown_block(text: str, kind: str = "text") -> str:
    """Text as it is, in a code block with a fence longer than any within; ``kind`` is of :data:`BLOCKS`."""
    text = clean(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{kind}\n{text}\n{fence}"


def show(value: Any) -> str:
    """A value as people read it: thousands grouped, four significant digits, lists joined."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, Mapping):
        kept = {clean(str(key)): item for key, item in value.items() if item not in ("", {}, [])}
        return ", ".join(f"{k} ({show(v)})" if isinstance(v, Mapping) else f"{k} {show(v)}" for k, v in kept.items())
    if isinstance(value, (list, tuple)):
        return ("; " if any(isinstance(item, Mapping) for item in value) else ", ").join(show(item) for item in value)
    return clean(str(value))


def compact(value: float) -> str:
    """A count with three significant digits and a unit: 1.31 M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.{2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0}f} {unit}"
    return show(round(value, 3))


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f} %"
