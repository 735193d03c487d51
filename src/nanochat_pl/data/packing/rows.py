"""Rows with addresses: row n is a pure function of documents, tokenizer, packing settings, seed and n."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.common.schema import to_plain
from nanochat_pl.data.cache.background_build import Job, start_builder
from nanochat_pl.data.cache.content_cache import fingerprint_of
from nanochat_pl.data.cache.tokens import TokenCache, token_cache_to_build
from nanochat_pl.data.packing.packer import PACKER_VERSION, Mode, Packing, Shuffle, pack
from nanochat_pl.data.packing.row_index import RowIndex, kept_index
from nanochat_pl.data.packing.streamed_index import Segments, StreamedIndex
from nanochat_pl.data.sources.base import Shard
from nanochat_pl.tokenizer import Tokenizer


@dataclass(frozen=True)
class PieceAddress:
    """Where a piece of a row comes from: tokens start … stop - 1 of a document, counted without bos.

    Attributes:
        shard: name of the source's shard.
        document: the document's number in that shard, from 0, empty ones counted too.
        length: tokens of the whole document.
        ids: of the piece, without its bos; of the tokenizer's integer type.
    """

    shard: str
    document: int
    start: int
    stop: int
    length: int
    ids: np.ndarray = field(repr=False, compare=False)


class Rows:
    """Rows of T inputs and T targets, read from a token cache by a row index.

    Args:
        index: which pieces make which row; its capacity is T+1.
        sequence_len: T.
        bos_id: stands in front of every piece, and fills padding.
    """

    def __init__(self, cache: TokenCache, index: RowIndex | StreamedIndex, sequence_len: int, bos_id: int) -> None:
        assert index.row_capacity == sequence_len + 1, f"rows of {index.row_capacity} places for T={sequence_len}"
        self.cache = cache
        self.index = index
        self.sequence_len = sequence_len
        self.bos_id = bos_id

    def __len__(self) -> int:
        return self.index.num_rows

    @property
    def is_streamed(self) -> bool:
        """Whether rows may still have to be waited for: the text is packed while it is trained on."""
        return isinstance(self.index, StreamedIndex)

    def wait_for(self, num_rows: int, check: Callable[[], None] = lambda: None) -> None:
        """Wait until the first so many rows are there; ``check`` is called again and again."""
        self.index.wait_for(num_rows, check)

    def epochs_after(self, num_rows: int) -> float:
        """Passes over the tokens after the first so many rows; of text that is packed while it is trained on, over the
        shards."""
        if isinstance(self.index, StreamedIndex):
            return self.index.segments_after(num_rows) / len(self.cache.shards)
        return num_rows / len(self) * self.index.stats.placed_tokens / self._num_tokens

    def record(self) -> dict[str, Any]:
        """What the rows are made of, for the record of a stage. Waits for all of them."""
        shards = self.cache.shards
        if isinstance(self.index, StreamedIndex):
            shards = shards[: self.index.num_segments]
        tokens = sum(shard.num_tokens for shard in shards)
        return {"train_tokens": tokens, "packing": to_plain(self.index.stats)}

    def read(self, row_numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows by number.

        Returns:
            inputs and targets, each int64 (R, T) for R row numbers. Target t is the token t+1, IGNORE_INDEX where that
            is padding or, for conversations, not trained on.

        Raises:
            IndexError: a row number is negative or past the end.
        """
        numbers = np.asarray(row_numbers, dtype=np.int64)
        self._check(numbers)
        capacity = self.sequence_len + 1
        num_pieces, pieces = self.index.pieces_of(numbers)
        document, start, length, with_bos = pieces.T
        shard, document_start = self.cache.positions(document)

        # The place of each piece's first token, all rows being one line of places.
        ends = np.cumsum(length + with_bos)
        row_ends = np.concatenate([[0], ends])[np.cumsum(num_pieces)]
        used = np.diff(row_ends, prepend=0)
        skipped = np.arange(len(numbers)) * capacity - (row_ends - used)
        first_places = ends - length + np.repeat(skipped, num_pieces)

        ids = np.full((len(numbers), capacity), self.bos_id, dtype=np.int64)
        # Of documents all is trained on, a piece's bos too: it tells that the one before has ended.
        trained = (np.arange(capacity) < used[:, None]) & (not self.cache.masked)
        flat_ids, flat_trained = ids.reshape(-1), trained.reshape(-1)
        # Pieces are long, so copying them one by one is faster than a gather by token.
        for number, begin, first_place, count in zip(
            shard.tolist(), (document_start + start).tolist(), first_places.tolist(), length.tolist(), strict=True
        ):
            source, to = self.cache.open_shard(number), slice(first_place, first_place + count)
            flat_ids[to] = source.tokens[begin : begin + count]
            if source.mask is not None:
                flat_trained[to] = source.mask[begin : begin + count]
        return ids[:, :-1].copy(), np.where(trained[:, 1:], ids[:, 1:], IGNORE_INDEX)

    def address(self, row_number: int) -> list[PieceAddress]:
        """What a row is made of, from left to right."""
        self._check(np.array([row_number]))
        addresses = []
        for document, start, length, _ in self.index.pieces_of(np.array([row_number]))[1].tolist():
            shard, number = self.cache.locate(document)
            first, end = shard.offsets[number : number + 2].tolist()
            ids = np.array(shard.tokens[first + start : first + start + length])
            addresses.append(PieceAddress(shard.name, number, start, start + length, end - first, ids))
        return addresses

    @cached_property
    def _num_tokens(self) -> int:
        return self.cache.num_tokens  # looks at the file of every shard, and each training step asks for it

    def _check(self, numbers: np.ndarray) -> None:
        wrong = numbers[(numbers < 0) | (numbers >= len(self))]
        if len(wrong):
            raise IndexError(f"row {wrong[0]} of {len(self)}")


def packed_rows(
    cache: TokenCache,
    sequence_len: int,
    bos_id: int,
    mode: Mode,
    cache_dir: Path,
    *,
    num_rows: int | None = None,
    epochs: int | None = None,
    **settings: Any,
) -> Rows:
    """Rows of a token cache, packed or found packed. For the arguments see
    :func:`nanochat_pl.data.packing.packer.pack`."""
    how = {**asdict(Packing(sequence_len + 1, mode, **settings)), "num_rows": num_rows, "epochs": epochs}
    del how["stream_rows"]  # it is always the default
    key = {"packer": PACKER_VERSION, "tokens": cache.fingerprint, **how}
    folder = cache_dir / "rows" / fingerprint_of(key)[:32]
    return Rows(cache, kept_index(folder, key, lambda: pack(cache.lengths, **how)), sequence_len, bos_id)


def streamed_rows(
    shards: Sequence[Shard],
    tokenizer: Tokenizer,
    cache_dir: Path,
    *,
    sequence_len: int,
    mode: Mode,
    num_rows: int,
    shuffle: Shuffle = "shards",
    **settings: Any,
) -> Rows:
    """Rows of shards that need not be tokenized yet: what is missing is built by a process of its own, from the first.

    Args:
        shards: of a split; they must stand being sent to another process.
        num_rows: how many rows there will be; the documents are read again until there are.
        mode, shuffle, settings: see :class:`~nanochat_pl.data.packing.packer.Packing`; the order ``global`` cannot be
            streamed.

    Raises:
        UserError: the process could not be started. What it meets later is raised by reading, or waiting for, rows.
    """
    packing = Packing(sequence_len + 1, mode, shuffle=shuffle, **settings)
    cache, to_build = token_cache_to_build(shards, tokenizer, cache_dir)
    key = {"packer": PACKER_VERSION, "tokens": cache.fingerprint, **asdict(packing)}
    if mode != "stream":
        del key[
            "stream_rows"
        ]  # nothing depends on it, and rows that were kept before there was such a key are the same
    segments = Segments(cache_dir / "rows" / fingerprint_of(key)[:32], key)
    known: list[int] = []
    while sum(known) < num_rows:
        shard = to_build[len(known)] if len(known) < len(to_build) else None
        if (shard is not None and not shard.is_there()) or (segment := segments.read(len(known))) is None:
            break
        known.append(segment.num_rows)
    builder = None
    if sum(known) < num_rows:
        builder = start_builder(Job(cache, tuple(to_build), tokenizer, packing, segments, num_rows), cache_dir)
    index = StreamedIndex(segments, packing.row_capacity, num_rows, known, builder)
    return Rows(cache, index, sequence_len, tokenizer.bos_id)


def validation_rows(cache: TokenCache, sequence_len: int, bos_id: int, cache_dir: Path, num_rows: int) -> Rows:
    """The rows to validate on: at most ``num_rows``, fewer where the documents end before.

    They depend on the held-out text, the tokenizer and T alone, on no setting of training, so metrics of runs that
    pack, shuffle or split otherwise can be compared. No token of a document is dropped; the last row may be padded.
    """
    return packed_rows(cache, sequence_len, bos_id, "split", cache_dir, num_rows=num_rows, epochs=1)
