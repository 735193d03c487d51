"""Documents out of one text file: cut at separators that its author put between them, else at blank lines."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from nanochat_pl.common.text_files import not_utf8, wide_encoding
from nanochat_pl.data.files.read import reading

# How the ends of documents are written in published text files: GPT-2's and Llama's tokens, wherever they stand; marks
# that may be text or HTML, alone in a line.
_ANYWHERE = [f"<|{name}|>" for name in ("endoftext", "end_of_text", "begin_of_text", "startoftext", "bos", "eos")]
_ALONE = ["<s>", "</s>", "<eos>", "<EOS>", "<bos>", "<BOS>", "[EOS]", "[BOS]"]
SEPARATOR = re.compile(
    f"{'|'.join(map(re.escape, _ANYWHERE))}|^[ \\t]*(?:{'|'.join(map(re.escape, _ALONE))})[ \\t]*$", re.MULTILINE
)
# To find out whether there is a mark at all: about ten times faster, since each begins with a fixed character.
_MARKS = [
    re.compile(f"{re.escape(sign)}(?:{'|'.join(re.escape(mark[1:]) for mark in marks)})")
    for sign, marks in itertools.groupby(sorted([*_ANYWHERE, *_ALONE]), key=lambda mark: mark[0])
]
_LONGEST_SEPARATOR = 64
_BLOCK = 2**16


def txt_documents(path: Path, max_chars: int) -> Iterator[str]:
    """A text file as documents of at most so many characters.

    Where it has separators of documents (``<|endoftext|>``), it is cut there; what is longer than ``max_chars``, and a
    file without them, at blank lines. A short file is one document. Where a stretch that long has no blank line, the
    cut is at a line's end, else at a blank, else anywhere. Line ends become ``\\n``; a byte order mark, the separators
    and the blank lines around a document go.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    text, start, searched = "", 0, 0  # up to where there is no separator
    with reading(path), path.open(encoding="utf-8-sig") as file:
        while True:
            try:
                block = file.read(_BLOCK)
            except UnicodeDecodeError as error:
                raise not_utf8(path, _first_bad_byte(path), error.reason) from error
            if "\0" in block and wide_encoding(block.encode("utf-8")) is not None:
                raise not_utf8(path, 0, "NULs between letters")
            if start:
                text, start, searched = text[start:], 0, max(searched - start, 0)
            text += block
            # Most files have none, and searching for the marks is many times faster than for separators.
            if not any(mark.search(text, searched) for mark in _MARKS):
                searched = len(text)
            while start < len(text):
                end, following = _next_cut(text, start, max(start, searched), max_chars, whole=not block)
                if end is None:
                    searched = max(len(text) - 2 * _LONGEST_SEPARATOR, 0)
                    break
                document = text[start:end].strip("\n")
                if document.strip():
                    yield document
                start = following
            if not block:
                return


def _next_cut(text: str, start: int, unsearched: int, max_chars: int, whole: bool) -> tuple[int | None, int]:
    """Where the document that begins at ``start`` ends, and where the next one begins; None: more has to be read.

    ``unsearched``: there is no separator before it. ``whole``: nothing comes behind the text; else a separator counts
    where it, and a sign behind it, can be seen.
    """
    reach = start + max_chars
    if not whole and len(text) <= reach + _LONGEST_SEPARATOR:
        seen = len(text) - _LONGEST_SEPARATOR
        found = SEPARATOR.search(text, unsearched)
        return (found.start(), found.end()) if found and found.end() <= seen else (None, start)
    found = SEPARATOR.search(text, unsearched, min(len(text), reach + _LONGEST_SEPARATOR))
    if found and found.start() <= reach:
        return found.start(), found.end()
    if len(text) <= reach:
        return len(text), len(text)
    for separator in ("\n\n", "\n", " "):
        at = text.rfind(separator, start, reach)
        if at > start:
            return at + len(separator), at + len(separator)
    return reach, reach


def _first_bad_byte(path: Path) -> int:
    """Position, from 0, of the first byte at which a file is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    with path.open("rb") as file:
        while True:
            block = file.read(_BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return position - pending + error.start
            if not block:
                return position
            position += len(block)
