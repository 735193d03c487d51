"""The packer: document lengths in, row index out. It never sees a token, so it runs ahead of any training.

A row has ``row_capacity`` = T+1 places (T inputs and T targets, shifted by one). What is put into a row is a *piece*: a
part of one document with bos in front, so a piece of n tokens takes n+1 places. All three modes fill a row with the
largest piece in a buffer that fits, the first that arrived among equals. They differ in what happens when none fits:

- ``crop``: the shortest piece is cut to the rest of the row, and what is cut off is dropped (the reference's packer).
- ``split``: documents are first cut into pieces of at most a row; when none fits, the shortest is cut to the rest of
  the row, and what is cut off goes back to the buffer: nothing is dropped.
- ``pad``: the rest of the row is padding (conversations).
"""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.row_index import PackingStats, RowIndex

PACKER_VERSION = 1  # part of the key of every kept index: a change of the rows needs a new one
Mode = Literal["crop", "split", "pad"]
Piece = tuple[int, int, int]  # document, first token, number of tokens; bos comes on top


def pack(
    lengths: np.ndarray,
    row_capacity: int,
    mode: Mode,
    *,
    num_rows: int | None = None,
    epochs: int | None = None,
    buffer_documents: int = 1_000,
    refill_documents: int = 128,
    shuffle: bool = True,
    seed: int = 0,
) -> RowIndex:
    """Pack documents into rows. A pure function: the index for n rows begins that for more rows.

    Args:
        lengths: tokens of each document, without bos; documents of no tokens are left out.
        row_capacity: places of a row, T+1.
        mode: see the top of this file. ``pad`` needs every document to fit into a row.
        num_rows: how many rows; the documents are read again, each epoch in its own order, until all are full.
        epochs: how many times the documents are read; rows hold documents of one epoch only, and the last row of an
            epoch may be padded. With ``num_rows`` too, whichever ends first.
        buffer_documents, refill_documents: before every pick, while the buffer holds fewer than ``buffer_documents``
            pieces, the next ``refill_documents`` documents are added.
        shuffle: read the documents of each epoch in an order of its own, made from the seed; false: in list order.
        seed: 0 … 2**32 - 1.

    Raises:
        UserError: there is no document with a token.

    Golden: packing_crop.*, packing_pad.*.
    """
    assert num_rows is not None or epochs is not None, "without num_rows or epochs packing has no end"
    lengths = np.asarray(lengths)
    if not (lengths > 0).any():
        raise UserError("there is nothing to pack: no document has a single token.")
    assert mode != "pad" or lengths.max() < row_capacity, "in pad mode every document must fit into a row"
    assert row_capacity >= 2, "a row needs a place for bos and one for a token"

    counter = _EpochCounter(lengths, shuffle, seed)
    max_piece = row_capacity - 1 if mode == "split" else None

    def rows_of(orders: Iterable[np.ndarray]) -> Iterator[tuple[list[Piece], int]]:
        chunks = _chunks(orders, lengths, refill_documents, max_piece)
        return _fill_rows(chunks, row_capacity, mode, buffer_documents)

    if epochs is None:
        groups = iter([rows_of(counter.order(epoch) for epoch in itertools.count())])
    else:
        groups = (rows_of([counter.order(epoch)]) for epoch in range(epochs))
    return _collect(groups, num_rows, row_capacity, counter)


class _EpochCounter:
    """Gives each epoch its order of documents, and remembers how many were begun."""

    def __init__(self, lengths: np.ndarray, shuffle: bool, seed: int) -> None:
        self._num_documents, self._shuffle, self._seed = len(lengths), shuffle, seed
        self.begun = 0

    def order(self, epoch: int) -> np.ndarray:
        self.begun = epoch + 1
        if not self._shuffle:
            return np.arange(self._num_documents)
        # RandomState and not a Generator: its numbers are the same in every version of numpy.
        return np.random.RandomState([self._seed, epoch]).permutation(self._num_documents)


def _chunks(
    orders: Iterable[np.ndarray], lengths: np.ndarray, refill_documents: int, max_piece: int | None
) -> Iterator[list[Piece]]:
    """The documents as pieces, as many documents at a time as a refill takes."""
    for order in orders:
        order = order[lengths[order] > 0]
        for first in range(0, len(order), refill_documents):
            documents = order[first : first + refill_documents]
            chunk: list[Piece] = []
            for document, length in zip(documents.tolist(), lengths[documents].tolist(), strict=True):
                step = max_piece or length
                chunk.extend((document, start, min(step, length - start)) for start in range(0, length, step))
            yield chunk


class _Buffer:
    """Pieces that wait, found by length and, among equals, by arrival."""

    def __init__(self) -> None:
        self._lengths: list[int] = []  # those that occur, sorted
        self._waiting: dict[int, deque[Piece]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, piece: Piece) -> None:
        length = piece[2]
        if length not in self._waiting:
            self._waiting[length] = deque()
            insort(self._lengths, length)
        self._waiting[length].append(piece)
        self._count += 1

    def take_largest(self, most: int) -> Piece | None:
        """The longest piece of at most so many tokens."""
        i = bisect_right(self._lengths, most) - 1
        return self._take(i) if i >= 0 else None

    def take_shortest(self) -> Piece:
        return self._take(0)

    def _take(self, i: int) -> Piece:
        length = self._lengths[i]
        waiting = self._waiting[length]
        piece = waiting.popleft()
        if not waiting:
            del self._waiting[length], self._lengths[i]
        self._count -= 1
        return piece


def _fill_rows(
    chunks: Iterator[list[Piece]], row_capacity: int, mode: Mode, buffer_size: int
) -> Iterator[tuple[list[Piece], int]]:
    """Rows, each with the number of tokens that were dropped to fill it, until the chunks end."""
    buffer = _Buffer()
    while True:
        row: list[Piece] = []
        cropped, room = 0, row_capacity
        while room:
            while len(buffer) < buffer_size and (chunk := next(chunks, None)) is not None:
                for piece in chunk:
                    buffer.add(piece)
            best = buffer.take_largest(room - 1)
            if best is None:
                if mode == "pad" or not len(buffer):
                    break
                document, start, length = buffer.take_shortest()
                best = document, start, room - 1
                if mode == "split":
                    buffer.add((document, start + room - 1, length - (room - 1)))
                else:
                    cropped += length - (room - 1)
            row.append(best)
            room -= best[2] + 1
        if not row:
            return
        yield row, cropped


def _collect(
    groups: Iterator[Iterator[tuple[list[Piece], int]]],
    num_rows: int | None,
    row_capacity: int,
    counter: _EpochCounter,
) -> RowIndex:
    flat_pieces, row_starts = array("i"), array("q", [0])  # compact: a long run has many millions of pieces
    epoch_starts = []
    cropped = 0
    for group in groups:
        rows_before = len(row_starts) - 1
        if rows_before == num_rows:
            break
        epoch_starts.append(rows_before)
        room = None if num_rows is None else num_rows - rows_before
        for row, cropped_here in itertools.islice(group, room):
            flat_pieces.extend(itertools.chain.from_iterable(row))
            row_starts.append(row_starts[-1] + len(row))
            cropped += cropped_here
    pieces = np.array(flat_pieces, dtype=np.int32).reshape(-1, 3)
    placed = int(pieces[:, 2].sum(dtype=np.int64))
    stats = PackingStats(
        placed_tokens=placed,
        cropped_tokens=cropped,
        padded_places=(len(row_starts) - 1) * row_capacity - placed - len(pieces),
        pieces=len(pieces),
        epochs=counter.begun,
    )
    starts = np.array(row_starts, dtype=np.int64)
    return RowIndex(row_capacity, starts, pieces, np.array(epoch_starts, dtype=np.int64), stats)
