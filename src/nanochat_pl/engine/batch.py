"""Many answers at the same time: rows in the slots of one cache, a waiting prompt in the place of a finished row."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nanochat_pl.engine.sampling import Sampling
from nanochat_pl.engine.sequence import Sequence

if TYPE_CHECKING:
    from nanochat_pl.engine.engine import Engine

# Prompts are read in groups of at most this many positions, padding included: bounds the memory of activations.
PREFILL_POSITIONS = 16_384


def write_all(engine: Engine, rows: list[Sequence], max_batch: int, sampling: Sampling) -> Iterator[int]:
    """Write until every row is finished; yields the number of finished rows whenever it grows."""
    if not rows:
        return
    batch = Batch(engine, rows, min(max_batch, len(rows)), sampling)
    num_finished = 0
    while batch.active or batch.waiting:
        batch.refill()
        batch.step()
        batch.drop_finished()
        still = len(batch.active) + len(batch.waiting)
        if len(rows) - still > num_finished:
            num_finished = len(rows) - still
            yield num_finished


class Batch:
    """Rows being written, row i of ``active`` in slot i of the cache, and rows that wait for a slot."""

    def __init__(self, engine: Engine, rows: list[Sequence], num_slots: int, sampling: Sampling) -> None:
        self._engine = engine
        self._sampling = sampling
        self._num_slots = num_slots
        self._cache = engine.new_cache(num_slots, max(row.max_context_asked for row in rows))
        # Longest first: prompts read together pad each other least, and what is too large for the memory fails at once.
        self.waiting = deque(sorted(rows, key=lambda row: -len(row.prompt)))
        self.active: list[Sequence] = []

    def refill(self) -> None:
        """Read waiting prompts into the free slots; each gets its first token."""
        while self.waiting and len(self.active) < self._num_slots:
            longest = len(self.waiting[0].prompt)
            count = min(self._num_slots - len(self.active), len(self.waiting), max(1, PREFILL_POSITIONS // longest))
            rows = [self.waiting.popleft() for _ in range(count)]
            start = len(self.active)
            self._cache.reset(range(start, start + count))
            logits = self._engine.logits(self._cache.rows(start, start + count), [row.prompt for row in rows])
            self._engine.advance(rows, logits, self._sampling)
            self.active += rows
            self.drop_finished()

    def step(self) -> None:
        """Give every active row its next token."""
        if self.active:
            cache = self._cache.rows(0, len(self.active))
            logits = self._engine.logits(cache, [[row.ids[-1]] for row in self.active])
            self._engine.advance(self.active, logits, self._sampling)

    def drop_finished(self) -> None:
        """Take finished rows out; the last active row moves into the gap, so that active slots stay together."""
        for slot in reversed(range(len(self.active))):
            if self.active[slot].finish_reason is not None:
                last = self.active.pop()
                if slot < len(self.active):
                    self._cache.copy_slot(len(self.active), slot)
                    self.active[slot] = last
