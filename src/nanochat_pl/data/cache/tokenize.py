"""Documents to arrays of ids, shard after shard: reading, encoding and writing at the same time.

Two shards are at work, each in a thread that reads its documents and writes their ids; all encoding is done by one pool
of threads. The second shard is read when the first has been read, so the encoders neither run dry while a file is
synced and hashed, nor keep the first shard waiting.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

BATCH_DOCUMENTS = 64
BATCH_CHARS = 500_000
_SHARDS_AT_WORK = 2

A = TypeVar("A")
B = TypeVar("B")


class Abandoned(Exception):
    """Nobody wants the shard any more."""


@dataclass(frozen=True)
class Encoder:
    """What encodes the documents of one shard.

    Attributes:
        dtype: that the ids are kept in.
        threads, num_threads: the pool, and how many are in it.
        all_read: called when the last document has been read.
        abandoned: set when the work is to end.
    """

    encode: Callable[[str], np.ndarray]
    dtype: str
    threads: Executor
    num_threads: int
    all_read: Callable[[], None]
    abandoned: threading.Event

    def __call__(self, documents: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of each document, in order. A few batches are read ahead and no more, however long the shard is."""
        window: deque[Future[list[np.ndarray]]] = deque()
        try:
            for texts in _batches(documents):
                window.append(self.threads.submit(self._encode, texts))
                if len(window) > 2 * self.num_threads:
                    yield from window.popleft().result()
                self.check()
            self.all_read()
            while window:
                yield from window.popleft().result()
        finally:
            for future in window:
                future.cancel()

    def check(self) -> None:
        """Raise :class:`Abandoned` where the work is to end."""
        if self.abandoned.is_set():
            raise Abandoned

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode(text).astype(self.dtype) for text in texts]


def in_order(
    shards: Iterable[A],
    work: Callable[[A, Encoder], B],
    encode: Callable[[str], np.ndarray],
    dtype: str,
    num_threads: int,
) -> Generator[B, None, None]:
    """``work`` for each shard, results in the order of the shards. What is begun when nobody asks on is abandoned."""
    abandoned = threading.Event()

    def run(shard: A, turn: threading.Event, all_read: threading.Event) -> B:
        turn.wait()
        try:
            encoder = Encoder(encode, dtype, encoders, num_threads, all_read.set, abandoned)
            encoder.check()
            return work(shard, encoder)
        finally:
            all_read.set()

    with ThreadPoolExecutor(num_threads) as encoders, ThreadPoolExecutor(_SHARDS_AT_WORK) as shard_threads:
        waiting: deque[Future[B]] = deque()
        turn = threading.Event()
        turn.set()
        try:
            for shard in shards:
                all_read = threading.Event()
                waiting.append(shard_threads.submit(run, shard, turn, all_read))
                turn = all_read
                if len(waiting) == _SHARDS_AT_WORK:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            abandoned.set()
            for future in waiting:
                future.cancel()


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists small enough to spread over all threads and large enough to hide the handing over."""
    batch: list[str] = []
    num_chars = 0
    for text in documents:
        batch.append(text)
        num_chars += len(text)
        if len(batch) == BATCH_DOCUMENTS or num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
