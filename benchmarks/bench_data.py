"""How fast data becomes rows: packing, tokenising, reading. Works without any download.

    python benchmarks/bench_data.py [FILE, FOLDER or GLOB of text]

Without a path the text is the documentation found on this machine (python_docs). Prints plain lines: median of several
runs and their spread.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nanochat_pl.data.opening import open_source
from nanochat_pl.data.packing import pack
from nanochat_pl.data.rows import packed_rows
from nanochat_pl.data.sources import DataSettings, Shard, Split
from nanochat_pl.data.token_cache import build_token_cache
from nanochat_pl.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer

REPEATS = 5
VOCAB_SIZE = 4096
NUM_CHARS = 8_000_000
SEQUENCE_LENS = (256, 2048)


class _Texts:
    """A source of some texts in memory, so that reading files is not measured."""

    name = "bench"
    fingerprint = "bench"

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def shards(self, split: Split) -> list[Shard]:
        return [Shard("all", split, "bench", lambda: iter(self._texts))]


def main(path: str | None = None) -> None:
    """Measure everything and print it."""
    with tempfile.TemporaryDirectory() as folder:
        settings = DataSettings(name="local", path=path) if path else DataSettings()
        source = open_source(settings, Path(folder))
        documents = (text for shard in source.shards("train") for text in shard.documents())
        num_chars = 0
        texts = []
        for text in documents:
            texts.append(text)
            num_chars += len(text)
            if num_chars >= NUM_CHARS:
                break
        tokenizer = train_tokenizer(texts, TokenizerSettings(vocab_size=VOCAB_SIZE))
        print(f"data: {len(texts):,} documents of {source.name}, {num_chars:,} characters")
        bench_packing(np.array([len(ids) for ids in tokenizer.encode_batch(texts)]))
        bench_tokenising(texts, tokenizer, Path(folder))
        bench_reading(texts, tokenizer, Path(folder))


def bench_packing(lengths: np.ndarray) -> None:
    """Lengths to row index."""
    for sequence_len in SEQUENCE_LENS:
        num_rows = 2**23 // sequence_len
        for mode in ("crop", "split"):
            seconds = _times(lambda mode=mode, t=sequence_len, n=num_rows: pack(lengths, t + 1, mode, num_rows=n))
            _print(f"packing {mode}, T={sequence_len}", num_rows, "rows", seconds)


def bench_tokenising(texts: list[str], tokenizer: Tokenizer, folder: Path) -> None:
    """Text to cache to row index, with nothing kept from before."""
    num_tokens = 0

    def run(number: int) -> None:
        nonlocal num_tokens
        cache = build_token_cache(_Texts(texts), "train", tokenizer, folder / str(number))
        packed_rows(cache, 256, tokenizer.bos_id, "split", folder / str(number), epochs=1)
        num_tokens = cache.num_tokens

    numbers = iter(range(REPEATS + 1))
    seconds = _times(lambda: run(next(numbers)))
    _print("tokenise + pack, T=256", num_tokens, "tokens", seconds)


def bench_reading(texts: list[str], tokenizer: Tokenizer, folder: Path) -> None:
    """Rows from the cache, in steps of 32 rows."""
    cache = build_token_cache(_Texts(texts), "train", tokenizer, folder)
    for sequence_len in SEQUENCE_LENS:
        num_rows = max(32, min(8_192, cache.num_tokens // sequence_len) // 32 * 32)
        rows = packed_rows(cache, sequence_len, tokenizer.bos_id, "split", folder, num_rows=num_rows)

        def read(rows=rows) -> None:
            for first in range(0, len(rows), 32):
                rows.read(range(first, first + 32))

        seconds = _times(read)
        _print(f"reading rows, T={sequence_len}", num_rows, "rows", seconds)
        _print(f"reading rows, T={sequence_len}", num_rows * sequence_len, "tokens", seconds)


def _times(run: Callable[[], object]) -> list[float]:
    run()
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return seconds


def _print(what: str, amount: int, unit: str, seconds: list[float]) -> None:
    rates = sorted(amount / each for each in seconds)
    spread = f"{rates[0]:,.0f} … {rates[-1]:,.0f}"
    print(f"{what}: {statistics.median(rates):,.0f} {unit}/s (n={len(rates)}, {spread})")


if __name__ == "__main__":
    main(*sys.argv[1:2])
