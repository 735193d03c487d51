"""A row index that grows while it is read: one segment for each turn of a shard.

A segment holds the rows that were completed when all documents of that shard had been given to the packer. So segments
are a function of shards, tokenizer and packing settings, whoever writes them, whenever, and after however many stops.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.data.packing.row_index import PackingStats, RowIndex, kept_index, read_index

_LOOK_AGAIN_SECONDS = 0.05
_PATIENCE_SECONDS = 5.0
_MAX_OPEN_SEGMENTS = 8


@dataclass(frozen=True)
class Segments:
    """Where the segments of an index are kept.

    Attributes:
        folder: of all of them, each in a folder with its number.
        key: of which they are a function, besides their number.
    """

    folder: Path
    key: dict[str, Any]

    def read(self, number: int) -> RowIndex | None:
        """A segment, if it is there and whole."""
        return read_index(*self._place(number))

    def keep(self, number: int, segment: RowIndex) -> None:
        """Write a segment, unless it is there."""
        kept_index(*self._place(number), lambda: segment)

    def _place(self, number: int) -> tuple[Path, dict[str, Any]]:
        return self.folder / f"{number:06d}", self.key | {"segment": number}


class Builder(Protocol):
    """Whoever writes the segments."""

    def segments_ready(self, known: int) -> int:
        """How many there are, from the first; :class:`UserError` where there never will be more than ``known``."""


class StreamedIndex:
    """Rows of segments, those that are there and those to come. Reading one that is not there yet waits for it.

    Args:
        row_capacity: places of a row, T+1.
        num_rows: rows that there will be.
        known: rows of each of the segments that are there, from the first.
        builder: writes the others; None where the known ones hold all rows.
    """

    def __init__(
        self, segments: Segments, row_capacity: int, num_rows: int, known: list[int], builder: Builder | None
    ) -> None:
        self.row_capacity, self.num_rows = row_capacity, num_rows
        self._segments, self._builder = segments, builder
        self._ends = np.cumsum(known, dtype=np.int64)  # rows in the first segment, in the first two …
        self._open: OrderedDict[int, RowIndex] = OrderedDict()

    @property
    def num_ready(self) -> int:
        """Rows that are known to be there."""
        return min(int(self._ends[-1]) if len(self._ends) else 0, self.num_rows)

    def segments_after(self, num_rows: int) -> float:
        """How many segments the first so many rows fill. Waits for them."""
        self.wait_for(num_rows)
        whole = int(np.searchsorted(self._ends, num_rows, side="right"))
        before = int(self._ends[whole - 1]) if whole else 0
        return whole + ((num_rows - before) / (int(self._ends[whole]) - before) if num_rows > before else 0.0)

    @property
    def num_segments(self) -> int:
        """Segments that hold the rows: turns of shards. Waits for all of them."""
        self.wait_for(self.num_rows)
        return int(np.searchsorted(self._ends, self.num_rows)) + 1

    @property
    def stats(self) -> PackingStats:
        """What became of the documents of these segments; some may stand in later rows. Waits for all."""
        return reduce(add, (self._segment(number).stats for number in range(self.num_segments)))

    def wait_for(self, num_rows: int, check: Callable[[], None] = lambda: None) -> None:
        """Wait until the first so many rows are there.

        Args:
            check: called again and again; what it raises ends the waiting.

        Raises:
            UserError: they will never be there: what the builder says.
        """
        assert num_rows <= self.num_rows, f"{num_rows} of {self.num_rows} rows"
        begin, told = time.monotonic(), False
        while self.num_ready < num_rows:
            check()
            assert self._builder is not None, "without a builder all rows are known"
            ready = self._builder.segments_ready(len(self._ends))
            if ready > len(self._ends):
                found = [self._segment(number).num_rows for number in range(len(self._ends), ready)]
                self._ends = np.append(self._ends, self._ends[-1:].sum() + np.cumsum(found))
                continue
            if not told and time.monotonic() - begin > _PATIENCE_SECONDS:
                told = True
                rank_zero_print(
                    f"Waiting for the text to be tokenized: {self.num_ready:,} rows are there, {num_rows:,} are needed."
                )
            time.sleep(_LOOK_AGAIN_SECONDS)

    def pieces_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`~nanochat_pl.data.packing.row_index.RowIndex.pieces_of`."""
        self.wait_for(int(rows.max(initial=-1)) + 1)
        segments = np.searchsorted(self._ends, rows, side="right")
        counts, pieces = [np.zeros(0, np.int64)], [np.zeros((0, 4), np.int64)]
        for places in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(segments)) + 1):
            if len(places):
                segment = self._segment(number := int(segments[places[0]]))
                found = segment.pieces_of(rows[places] - self._ends[number] + segment.num_rows)
                counts.append(found[0])
                pieces.append(found[1])
        return np.concatenate(counts), np.concatenate(pieces)

    def _segment(self, number: int) -> RowIndex:
        if number not in self._open:
            segment = self._segments.read(number)
            if segment is None:
                raise UserError(f"{self._segments.folder}: segment {number} was whole and is not any more.")
            self._open[number] = segment
            if len(self._open) > _MAX_OPEN_SEGMENTS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        """Sent to another process, the files are opened there again."""
        return self.__dict__ | {"_open": OrderedDict()}
