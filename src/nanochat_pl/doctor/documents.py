"""Documents as the doctor sees them: by number, with lengths, text and place, wherever they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from nanochat_pl.data.cache.tokens import TokenCache
from nanochat_pl.tokenizer import Tokenizer

_SHOWN_CHARS = 70


class Documents:
    """Documents by number, with their text.

    Attributes:
        lengths: tokens of each, 0 for an empty one; characters where ``counts_tokens`` is false.
        counts_tokens: which of both.
        target_share: share of the tokens that are trained on.
    """

    counts_tokens = True
    target_share = 1.0
    lengths: np.ndarray

    def text(self, number: int) -> str:
        """The text of a document; what is no text, such as the marks of a conversation, is a line end."""
        raise NotImplementedError

    def place(self, number: int) -> str:
        """Where a document is, for people."""
        raise NotImplementedError

    def content(self, number: int) -> bytes:
        """Bytes that are equal where documents are."""
        raise NotImplementedError


class CachedDocuments(Documents):
    """The documents of a token cache."""

    def __init__(self, cache: TokenCache, tokenizer: Tokenizer, place: Callable[[int], str] | None = None) -> None:
        self.lengths = cache.lengths
        self._cache, self._tokenizer, self._place = cache, tokenizer, place
        if cache.masked:
            trained = sum(int(shard.mask.sum(dtype=np.int64)) for shard in cache.shards if shard.mask is not None)
            self.target_share = trained / max(cache.num_tokens, 1)

    def text(self, number: int) -> str:
        ids = self._cache.tokens(number)
        ordinary = len(self._tokenizer.tokens)
        if not (ids >= ordinary).any():
            return self._tokenizer.decode(ids.tolist())
        marks = np.flatnonzero(ids >= ordinary)
        parts = np.split(ids, np.unique(np.concatenate([marks, marks + 1])))
        texts = [self._tokenizer.decode(part.tolist()) for part in parts if len(part) and part[0] < ordinary]
        return "\n".join(texts)

    def place(self, number: int) -> str:
        if self._place is not None:
            return self._place(number)
        shard, document = self._cache.locate(number)
        return f"{shard.name}, document {document:,}"

    def content(self, number: int) -> bytes:
        return self._cache.tokens(number).tobytes()


class TextDocuments(Documents):
    """Documents that have no tokens yet."""

    counts_tokens = False

    def __init__(self, texts: Sequence[tuple[str, str]]) -> None:
        """``texts``: place and text of each."""
        self.lengths = np.array([len(text) for _, text in texts], np.int64)
        self._texts = texts

    def text(self, number: int) -> str:
        return self._texts[number][1]

    def place(self, number: int) -> str:
        return self._texts[number][0]

    def content(self, number: int) -> bytes:
        return self._texts[number][1].encode("utf-8", "surrogatepass")


class JoinedDocuments(Documents):
    """The documents of several sources, one source after the other."""

    def __init__(self, parts: Mapping[str, Documents]) -> None:
        """``parts``: by name, at least one."""
        self._names, self._parts = list(parts), list(parts.values())
        self.lengths = np.concatenate([part.lengths for part in self._parts])
        self._ends = np.cumsum([len(part.lengths) for part in self._parts])

    def text(self, number: int) -> str:
        part, within = self._locate(number)
        return self._parts[part].text(within)

    def place(self, number: int) -> str:
        part, within = self._locate(number)
        return f"{self._names[part]}/{self._parts[part].place(within)}"

    def content(self, number: int) -> bytes:
        part, within = self._locate(number)
        return self._parts[part].content(within)

    def _locate(self, number: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, number, side="right"))
        return part, number - int(self._ends[part - 1] if part else 0)


def shortened(text: str, chars: int = _SHOWN_CHARS) -> str:
    """The beginning of a text in one line, in quotes."""
    line = " ".join(text[: 4 * chars].split())
    return repr(line if len(line) <= chars and len(text) <= 4 * chars else f"{line[:chars]}…")


def both_ends(text: str, chars: int = 2 * _SHOWN_CHARS) -> str:
    """The beginning and the end of a text in one line, in quotes."""
    line = " ".join(text.split())
    return repr(line if len(line) <= chars else f"{line[: chars // 2]} … {line[-chars // 2 :]}")
