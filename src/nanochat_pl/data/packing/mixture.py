"""Rows of several sources in one fixed, even order: whose row n of a run is follows from the weights and n alone.

Every row is of one source and has as many tokens as any other, so shares by row are shares by token. Each source is
tokenized and packed on its own, and its rows are taken one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from nanochat_pl.data.packing.rows import PieceAddress, Rows
from nanochat_pl.data.sources.base import MIN_SHARE

MAX_PERIOD = round(1 / MIN_SHARE)  # rows after which the order of the sources begins again


class MixtureSchedule:
    """Which source each row is of.

    Row m of a source with the share p is due before row (m + 1) / p of all, and may not come before row m / p. Among
    those that may come, the one that is due first comes, among equals the first source. Then after any number of rows
    each source has its share, less than one row more or less (R. Tijdeman, The chairman assignment problem, 1980). A
    share below one row in the period would not be seen.

    Attributes:
        weights: as whole numbers, in lowest terms; shares finer than 1 / MAX_PERIOD are rounded to it.
        period: their sum; after so many rows the order begins again.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """``weights``: positive, none below MIN_SHARE of their sum, which need not be one."""
        self.weights = whole_weights(weights)
        self.period = sum(self.weights)
        self._order = _order(self.weights)
        # The number of each row of the period among those of its source.
        self._place = np.empty_like(self._order)
        for source, weight in enumerate(self.weights):
            self._place[self._order == source] = np.arange(weight)

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each row, and its number among the rows of that source; all int64 (R,)."""
        turn, within = np.divmod(rows, self.period)
        source = self._order[within]
        return source, turn * np.array(self.weights)[source] + self._place[within]

    def counts(self, num_rows: int) -> list[int]:
        """How many of the first rows are of each source."""
        turns, rest = divmod(num_rows, self.period)
        of_rest = np.bincount(self._order[:rest], minlength=len(self.weights))
        return [turns * weight + int(more) for weight, more in zip(self.weights, of_rest, strict=True)]

    @property
    def shares(self) -> list[float]:
        """Of each source, of all rows."""
        return [weight / self.period for weight in self.weights]


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the same proportions as the decimal numbers that a person typed."""
    exact = [Fraction(str(weight)) for weight in weights]
    assert exact and min(exact) > 0, weights
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    whole = [weight // math.gcd(*whole) for weight in whole]
    total = sum(whole)
    if total <= MAX_PERIOD:
        return tuple(whole)
    # Rounded by the largest remainder; a source that was not refused keeps one row of the period.
    rounded = [max(weight * MAX_PERIOD // total, 1) for weight in whole]
    by_remainder = sorted(range(len(whole)), key=lambda source: -(whole[source] * MAX_PERIOD % total))
    for source in by_remainder[: max(MAX_PERIOD - sum(rounded), 0)]:
        rounded[source] += 1
    return tuple(rounded)


def _order(weights: Sequence[int]) -> np.ndarray:
    period, taken = sum(weights), [0] * len(weights)
    sources = range(len(weights))
    # The last row of all before which the next row of a source must have come.
    due = [-(-period // weight) for weight in weights]
    order = np.empty(period, dtype=np.int64)
    for row in range(1, period + 1):
        source = min((s for s in sources if taken[s] * period < row * weights[s]), key=due.__getitem__)
        taken[source] += 1
        due[source] = -(-(taken[source] + 1) * period // weights[source])
        order[row - 1] = source
    return order


class MixedRows:
    """Rows of several sources, read as if they were of one: see :class:`~nanochat_pl.data.packing.rows.Rows`.

    Args:
        parts: the rows of each source by its name; all of the same T. Each has as many as are taken of it, or more.
        turns: of these sources, in this order.
        num_rows: how many rows there are.
    """

    def __init__(self, parts: Mapping[str, Rows], turns: MixtureSchedule, num_rows: int) -> None:
        self.names, self._parts = tuple(parts), tuple(parts.values())
        self.turns, self._num_rows = turns, num_rows
        self.sequence_len = self._parts[0].sequence_len
        for part, count in zip(self._parts, turns.counts(num_rows), strict=True):
            assert part.sequence_len == self.sequence_len and len(part) >= count, (part.sequence_len, len(part), count)

    def __len__(self) -> int:
        return self._num_rows

    def epochs_after(self, num_rows: int) -> list[float]:
        """Passes over the text of each source after the first so many rows of all."""
        counts = zip(self._parts, self.turns.counts(num_rows), strict=True)
        return [part.epochs_after(count) for part, count in counts]

    def parts(self) -> dict[str, Rows]:
        return dict(zip(self.names, self._parts, strict=True))

    def place(self, row_numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each row the number of its source (see ``names``) and its number among that source's rows: int64 (R,).

        Raises:
            IndexError: a row number is negative or past the end.
        """
        numbers = np.asarray(row_numbers, dtype=np.int64)
        wrong = numbers[(numbers < 0) | (numbers >= len(self))]
        if len(wrong):
            raise IndexError(f"row {wrong[0]} of {len(self)}")
        return self.turns.of(numbers)

    def read(self, row_numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, each int64 (R, T)."""
        sources, rows = self.place(row_numbers)
        inputs, targets = (np.empty((len(rows), self.sequence_len), dtype=np.int64) for _ in range(2))
        for source in np.unique(sources).tolist():
            here = sources == source
            inputs[here], targets[here] = self._parts[source].read(rows[here])
        return inputs, targets

    def address(self, row_number: int) -> list[PieceAddress]:
        """What a row is made of, from left to right; its shards are named SOURCE/SHARD."""
        sources, rows = self.place([row_number])
        name, part = self.names[sources[0]], self._parts[sources[0]]
        return [replace(piece, shard=f"{name}/{piece.shard}") for piece in part.address(int(rows[0]))]

    @property
    def is_streamed(self) -> bool:
        """Whether rows of a source may still have to be waited for."""
        return any(part.is_streamed for part in self._parts)

    def wait_for(self, num_rows: int, check: Callable[[], None] = lambda: None) -> None:
        """Wait until the first so many rows are there; ``check`` is called again and again."""
        for part, count in zip(self._parts, self.turns.counts(num_rows), strict=True):
            part.wait_for(count, check)

    def record(self) -> dict[str, Any]:
        """What the rows are made of, for the record of a stage. Waits for all of them."""
        return {"shares": dict(zip(self.names, self.turns.shares, strict=True))} | {
            "sources": {name: part.record() for name, part in self.parts().items()}
        }
