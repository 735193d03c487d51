"""The packer: document lengths in, row index out. It never sees a token, so it runs ahead of any training.

A row has ``row_capacity`` = T+1 places (T inputs and T targets, shifted by one). What is put into a row is a *piece*: a
part of one document with bos in front, so a piece of n tokens takes n+1 places. Three modes fill a row with the
largest piece in a buffer that fits, the first that arrived among equals. They differ in what happens when none fits:

- ``crop``: the shortest piece is cut to the rest of the row, and what is cut off is dropped (the reference's packer).
- ``split``: documents are first cut into pieces of at most a row; when none fits, the shortest is cut to the rest of
  the row, and what is cut off goes back to the buffer: nothing is dropped.
- ``pad``: the rest of the row is padding (conversations).

Two modes take the documents as they come:

- ``stream``: documents, each with bos in front, are laid end to end and cut into rows. So a row may begin anywhere in a
  document, and only the piece that begins one has bos. The last target of a row is the first input of the next, but for
  the last row of every ``stream_rows``: the next one begins after its last target (rows of one batch of a machine, in
  the recipe that packed so). Nothing is dropped; what is left at the end of the last epoch is padded.
- ``pad_one``: each document has a row of its own, and the rest is padding.

Documents arrive in the order that ``shuffle`` says. ``global`` needs the lengths of all of them; ``shards`` and
``none`` take one shard after the other, so the rows of the first shards are known before the last one is tokenized.

The buffer is a queue for each length that occurs, and a sorted list of these lengths: finding the best fit takes time
logarithmic in the size of the buffer. (Taking a length out of that list moves the ones behind it, some kilobytes of
memory at most, which is faster than any tree.)
"""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.packing.row_index import PackingStats, RowIndex

PACKER_VERSION = 1  # part of the key of every kept index: a change of the rows needs a new one
Mode = Literal["crop", "split", "pad", "stream", "pad_one"]
STREAM_ROWS = 32
Shuffle = Literal["global", "shards", "none"]
Piece = tuple[int, int, int, int]  # document, first token, number of tokens, whether bos comes on top
Row = tuple[list[Piece], int]  # with the number of tokens that were dropped to fill it
_NOTHING = "there is nothing to pack: no document has a single token."


class Feed(NamedTuple):
    """Documents that are given to the packer together."""

    first_document: int
    lengths: np.ndarray  # (num_documents,): tokens of each, without bos
    order: np.ndarray  # int64 (num_documents,): which comes when, counted from the first one


@dataclass(frozen=True)
class Packing:
    """How documents become rows.

    Attributes:
        row_capacity: places of a row, T+1.
        mode: see the top of this file. ``pad`` and ``pad_one`` need every document to fit into a row.
        buffer_documents, refill_documents: before every pick, while the buffer holds fewer than ``buffer_documents``
            pieces, the next ``refill_documents`` documents are added.
        shuffle: the order of documents. ``global``: all of them in an order of its own for each epoch; ``shards``: the
            documents of each shard in an order of its own, the shards as they are given in the first epoch, and in an
            order of its own in each later one; ``none``: as they are given.
        seed: of these orders, 0 … 2**32 - 1.
        stream_rows: in the mode ``stream``, see there.
    """

    row_capacity: int
    mode: Mode
    buffer_documents: int = 1_000
    refill_documents: int = 128
    shuffle: Shuffle = "global"
    seed: int = 0
    stream_rows: int = STREAM_ROWS

    def __post_init__(self) -> None:
        assert self.row_capacity >= 2, "a row needs a place for bos and one for a token"


def pack(
    lengths: np.ndarray,
    row_capacity: int,
    mode: Mode,
    *,
    num_rows: int | None = None,
    epochs: int | None = None,
    **settings: Any,
) -> RowIndex:
    """Pack documents into rows. A pure function: the index for n rows begins that for more rows.

    Args:
        lengths: tokens of each document, without bos; documents of no tokens are left out.
        num_rows: how many rows; the documents are read again, each epoch in its own order, until all are full.
        epochs: how many times the documents are read; rows hold documents of one epoch only, and the last row of an
            epoch may be padded. With ``num_rows`` too, whichever ends first.
        row_capacity, mode, settings: see :class:`Packing`; all documents are one shard.

    Raises:
        UserError: there is no document with a token.

    Golden: packing_crop.*, packing_pad.*.
    """
    assert num_rows is not None or epochs is not None, "without num_rows or epochs packing has no end"
    lengths = np.asarray(lengths)
    if not (lengths > 0).any():
        raise UserError(_NOTHING)
    assert not mode.startswith("pad") or lengths.max() < row_capacity, f"{mode}: every document must fit into a row"
    packing = Packing(row_capacity, mode, **settings)
    begun = 0

    def feed(epoch: int) -> Feed:
        nonlocal begun
        begun = epoch + 1
        return Feed(0, lengths, _order(len(lengths), packing, epoch, 0))

    if epochs is None:
        groups = iter([_rows(map(feed, itertools.count()), packing)])
    else:
        groups = (_rows([feed(epoch)], packing) for epoch in range(epochs))
    collected = _Collected(packing)
    epoch_starts = []
    for group in groups:
        if collected.num_rows == num_rows:
            break
        epoch_starts.append(collected.num_rows)
        room = None if num_rows is None else num_rows - collected.num_rows
        for row in itertools.islice((row for row in group if row is not None), room):
            collected.add(row)
    return collected.index(row_capacity, begun, epoch_starts)


def pack_as_they_come(
    lengths_of: Callable[[int], np.ndarray], first_document: Callable[[int], int], num_shards: int, packing: Packing
) -> Iterator[RowIndex]:
    """Pack shard after shard, without an end.

    Args:
        lengths_of: tokens of each document of a shard, without bos; called for a shard when its turn has come.
        first_document: the number of a shard's first document; called after ``lengths_of``.
        num_shards: shards of an epoch; after the last one come all of them again.
        packing: with an order that takes one shard after the other.

    Yields:
        For each turn of a shard the rows that were completed before more documents than its were needed.

    Raises:
        UserError: an epoch has no document with a token.
    """
    assert packing.shuffle != "global", "the order of all documents needs the lengths of all"
    found_tokens, epoch = False, 0

    def feeds() -> Iterator[Feed]:
        nonlocal found_tokens, epoch
        for epoch in itertools.count():
            for shard in _order_of_shards(num_shards, packing, epoch):
                lengths = lengths_of(shard)
                found_tokens = found_tokens or bool((lengths > 0).any())
                yield Feed(first_document(shard), lengths, _order(len(lengths), packing, epoch, shard))
            if not found_tokens:
                raise UserError(_NOTHING)

    collected, begun = _Collected(packing), 0
    for row in _rows(feeds(), packing):
        if row is not None:
            collected.add(row)
            continue
        yield collected.index(packing.row_capacity, epoch + 1 - begun, [])
        collected, begun = _Collected(packing), epoch + 1


def _order_of_shards(num_shards: int, packing: Packing, epoch: int) -> list[int]:
    if epoch == 0 or packing.shuffle == "none":
        return list(range(num_shards))
    return np.random.RandomState([packing.seed, epoch]).permutation(num_shards).tolist()


def _order(num_documents: int, packing: Packing, epoch: int, shard: int) -> np.ndarray:
    if packing.shuffle == "none":
        return np.arange(num_documents)
    # RandomState and not a Generator: its numbers are the same in every version of numpy.
    seeds = [packing.seed, epoch] if packing.shuffle == "global" else [packing.seed, epoch, shard]
    return np.random.RandomState(seeds).permutation(num_documents)


def _rows(feeds: Iterable[Feed], packing: Packing) -> Iterator[Row | None]:
    max_piece = packing.row_capacity - 1 if packing.mode == "split" else None
    chunks = _chunks(feeds, packing.refill_documents, max_piece)
    if packing.mode == "stream":
        return _cut_stream(chunks, packing.row_capacity, packing.stream_rows)
    if packing.mode == "pad_one":
        return _one_to_a_row(chunks)
    return _fill_rows(chunks, packing.row_capacity, packing.mode, packing.buffer_documents)


def _chunks(feeds: Iterable[Feed], refill_documents: int, max_piece: int | None) -> Iterator[list[Piece]]:
    """The documents as pieces, as many documents at a time as a refill takes; after each feed an empty list."""
    for first_document, lengths, order in feeds:
        order = order[lengths[order] > 0]
        for first in range(0, len(order), refill_documents):
            numbers = order[first : first + refill_documents]
            chunk: list[Piece] = []
            for document, length in zip((first_document + numbers).tolist(), lengths[numbers].tolist(), strict=True):
                step = max_piece or length
                chunk.extend((document, start, min(step, length - start), 1) for start in range(0, length, step))
            yield chunk
        yield []


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
        return self.take(i) if i >= 0 else None

    def take(self, i: int) -> Piece:
        """One of the pieces of the i-th of the lengths that occur, from the shortest."""
        length = self._lengths[i]
        waiting = self._waiting[length]
        piece = waiting.popleft()
        if not waiting:
            del self._waiting[length], self._lengths[i]
        self._count -= 1
        return piece


def _fill_rows(chunks: Iterator[list[Piece]], row_capacity: int, mode: Mode, buffer_size: int) -> Iterator[Row | None]:
    """Rows until the chunks end; None where more than the feed that has ended is needed to go on."""
    buffer = _Buffer()
    while True:
        row: list[Piece] = []
        cropped, room = 0, row_capacity
        while room:
            while len(buffer) < buffer_size and (chunk := next(chunks, None)) is not None:
                for piece in chunk:
                    buffer.add(piece)
                if not chunk:
                    yield None
            best = buffer.take_largest(room - 1)
            if best is None:
                if mode == "pad" or not len(buffer):
                    break
                document, start, length, _ = buffer.take(0)
                best = document, start, room - 1, 1
                if mode == "split":
                    buffer.add((document, start + room - 1, length - (room - 1), 1))
                else:
                    cropped += length - (room - 1)
            row.append(best)
            room -= best[2] + 1
        if not row:
            return
        yield row, cropped


def _cut_stream(chunks: Iterator[list[Piece]], row_capacity: int, rows_of_batch: int) -> Iterator[Row | None]:
    """Documents end to end; None as in :func:`_fill_rows`. A document's place 0 is its bos, place n its n-th token."""
    row: list[Piece] = []
    room, num_rows = row_capacity, 0
    for chunk in chunks:
        for document, _, length, _ in chunk:
            place = 0
            while place <= length:
                end = min(place + room, length + 1)
                with_bos = int(place == 0)
                row.append((document, max(place - 1, 0), end - place - with_bos, with_bos))
                room -= end - place
                place = end
                if room:
                    break
                yield row, 0
                row, room, num_rows = [], row_capacity, num_rows + 1
                if num_rows % rows_of_batch:
                    place -= 1  # the last target is an input too
        if not chunk:
            yield None
    if room < row_capacity - 1:  # with a single place there is nothing to predict
        yield row, 0


def _one_to_a_row(chunks: Iterator[list[Piece]]) -> Iterator[Row | None]:
    for chunk in chunks:
        for piece in chunk:
            yield [piece], 0
        if not chunk:
            yield None


class _Collected:
    """Rows on their way into an index. Compact: a long run has many millions of pieces.

    Whether bos stands in front of a piece is kept where that differs: of a stream.
    """

    def __init__(self, packing: Packing) -> None:
        self._columns = 4 if packing.mode == "stream" else 3
        self._pieces, self._row_starts, self._cropped = array("i"), array("q", [0]), 0

    @property
    def num_rows(self) -> int:
        return len(self._row_starts) - 1

    def add(self, row: Row) -> None:
        pieces, cropped = row
        self._pieces.extend(itertools.chain.from_iterable(piece[: self._columns] for piece in pieces))
        self._row_starts.append(self._row_starts[-1] + len(pieces))
        self._cropped += cropped

    def index(self, row_capacity: int, epochs: int, epoch_starts: list[int]) -> RowIndex:
        pieces = np.array(self._pieces, dtype=np.int32).reshape(-1, self._columns)
        placed = int(pieces[:, 2].sum(dtype=np.int64))
        with_bos = len(pieces) if self._columns == 3 else int(pieces[:, 3].sum(dtype=np.int64))
        padded = self.num_rows * row_capacity - placed - with_bos
        stats = PackingStats(placed, self._cropped, padded, with_bos, epochs)
        starts = np.array(self._row_starts, dtype=np.int64)
        return RowIndex(row_capacity, starts, pieces, np.array(epoch_starts, dtype=np.int64), stats)
