"""What a mixture costs: reading rows of two sources against reading those of one, and finding whose turn a row is.

python benchmarks/bench_mixture.py ../shared/data/text
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nanochat_pl.data.cache.tokens import build_token_cache
from nanochat_pl.data.packing.mixture import MixedRows, MixtureSchedule
from nanochat_pl.data.packing.rows import packed_rows
from nanochat_pl.data.sources.base import DataSettings
from nanochat_pl.data.sources.open import open_source
from nanochat_pl.tokenizer import TokenizerSettings, train_tokenizer

T, NUM_ROWS, AT_ONCE, REPEATS = 2048, 4096, 32, 7


def seconds(work: Callable[[], object]) -> list[float]:
    """Of several repeats, after one that warms the page cache up."""
    work()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return times


def main(path: str) -> None:
    """Print the metrics."""
    with tempfile.TemporaryDirectory() as folder:
        cache_dir = Path(folder)
        source = open_source(DataSettings(name="local", path=path), cache_dir)
        documents = (text for shard in source.shards("train") for text in shard.documents())
        tokenizer = train_tokenizer(documents, TokenizerSettings(vocab_size=8_192, max_chars=5_000_000))
        cache = build_token_cache(source, "train", tokenizer, cache_dir)
        packed = [
            packed_rows(cache, T, tokenizer.bos_id, "split", cache_dir, num_rows=NUM_ROWS, seed=s) for s in (0, 1)
        ]
        mixed = MixedRows(dict(zip("ab", packed, strict=True)), MixtureSchedule([0.7, 0.3]), NUM_ROWS)
        numbers = np.arange(NUM_ROWS).reshape(-1, AT_ONCE)
        for name, rows in (("one source", packed[0]), ("two sources", mixed)):
            times = seconds(lambda rows=rows: [rows.read(some) for some in numbers])
            median, *ends = (NUM_ROWS * T / 1e6 / each for each in (statistics.median(times), max(times), min(times)))
            print(f"{name}: {median:.0f} million tokens a second ({ends[0]:.0f} … {ends[1]:.0f})")
    for weights in ([0.7, 0.3], [0.333333, 0.4, 0.123456, 0.1, 0.043211]):
        times = seconds(lambda weights=weights: MixtureSchedule(weights))
        print(
            f"whose turn, a period of {MixtureSchedule(weights).period:,} rows: {statistics.median(times) * 1e3:.1f} ms"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
