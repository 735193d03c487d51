"""Documents as the doctor sees them: by number, with lengths, text and place, whichever caches they are in."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from nanochat_pl.data.cache.tokens import TokenCache
from nanochat_pl.tokenizer import Tokenizer

_SHOWN_CHARS = 70


class Documents:
    """The documents of one or several token caches, one cache after the other.

    Args:
        caches: by the name of their source, "" where there is one alone.
        place: says where a document is, for people; None: by shard and number.

    Attributes:
        lengths: tokens of each, 0 for an empty one.
        target_share: share of the tokens that are trained on.
    """

    def __init__(
        self, caches: Mapping[str, TokenCache], tokenizer: Tokenizer, place: Callable[[int], str] | None = None
    ) -> None:
        self._names, self._caches = list(caches), list(caches.values())
        self._tokenizer, self._place = tokenizer, place
        self.lengths = np.concatenate([cache.lengths for cache in self._caches])
        self._ends = np.cumsum([len(cache.lengths) for cache in self._caches])
        self.target_share = 1.0
        if any(cache.masked for cache in self._caches):  # conversations: one cache
            masks = [shard.mask for cache in self._caches for shard in cache.shards if shard.mask is not None]
            trained = sum(int(mask.sum(dtype=np.int64)) for mask in masks)
            self.target_share = trained / max(int(self.lengths.sum(dtype=np.int64)), 1)

    def text(self, number: int) -> str:
        """The text of a document; what is no text, such as the marks of a conversation, is a line end."""
        ids = self._tokens(number)
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
        part, within = self._locate(number)
        shard, document = self._caches[part].locate(within)
        name = self._names[part]
        return f"{f'{name}/' if name else ''}{shard.name}, document {document:,}"

    def content(self, number: int) -> bytes:
        """Bytes that are equal where documents are."""
        return self._tokens(number).tobytes()

    def _tokens(self, number: int) -> np.ndarray:
        part, within = self._locate(number)
        return self._caches[part].tokens(within)

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
