"""How fast data becomes rows: packing, tokenizing, reading, seeking. Works without any download.

    python benchmarks/bench_data.py [FILE, FOLDER or GLOB of text]

Without a path the text is the documentation found on this machine (python_docs). Prints plain lines: median of several
runs, their number and their spread, and the same by the CPU seconds of this process, which say more than the clock
where others use the machine too. What is compared is measured in turns, so that both meet the same machine.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nanochat_pl.data.cache.tokens import TokenCache, build_token_cache
from nanochat_pl.data.packing.packer import pack
from nanochat_pl.data.packing.rows import Rows, packed_rows, streamed_rows
from nanochat_pl.data.sources.base import DataSettings, Source
from nanochat_pl.data.sources.open import open_source
from nanochat_pl.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer

REPEATS = 5
VOCAB_SIZE = 32_768
TOKENIZER_CHARS = 8_000_000
SEQUENCE_LENS = (256, 2048)
ROWS_OF_MEMORY = 10_000
Seconds = tuple[float, float]  # by the clock, and of this process on the CPU


def main(path: str | None = None) -> None:
    """Measure everything and print it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = open_source(DataSettings(name="local", path=path) if path else DataSettings(), folder)
        texts = [text for shard in source.shards("train") for text in shard.documents()]
        num_chars = list(itertools.accumulate(map(len, texts)))
        for_tokenizer = texts[: sum(total <= TOKENIZER_CHARS for total in num_chars) + 1]
        tokenizer = train_tokenizer(for_tokenizer, TokenizerSettings(vocab_size=VOCAB_SIZE))
        print(f"data: {len(texts):,} documents of {source.name}, {num_chars[-1]:,} characters; {os.cpu_count()} cores")
        bench_tokenizing(source, texts, tokenizer, folder)
        cache = build_token_cache(source, "train", tokenizer, folder)
        bench_packing(cache.lengths)
        bench_reading(cache, tokenizer, folder)
        bench_streaming(source, tokenizer, folder)


def bench_tokenizing(source: Source, texts: list[str], tokenizer: Tokenizer, folder: Path) -> None:
    """Files to cache, with nothing kept from before, against tiktoken alone on the texts in memory."""
    num_threads = os.cpu_count() or 1
    numbers = itertools.count()
    num_tokens = 0

    def build() -> None:
        nonlocal num_tokens
        num_tokens = build_token_cache(
            source, "train", tokenizer, folder / f"new-{next(numbers)}", num_threads=num_threads
        ).num_tokens

    def alone() -> None:
        tokenizer._encoding.encode_ordinary_batch(texts, num_threads=num_threads)

    build_seconds, alone_seconds = _in_turns(build, alone)
    _print("tiktoken alone", num_tokens, "tokens", alone_seconds)
    _print("building the cache", num_tokens, "tokens", build_seconds)
    for clock, what in enumerate(("by the clock", "by CPU seconds")):
        pairs = zip(alone_seconds, build_seconds, strict=True)
        shares = [100 * one[clock] / other[clock] for one, other in pairs]
        print(
            f"cache against tiktoken alone, {num_threads} threads, {what}: {statistics.median(shares):.0f}% of its "
            f"speed (n={len(shares)}, {min(shares):.0f} … {max(shares):.0f})"
        )


def bench_packing(lengths: np.ndarray) -> None:
    """Lengths to row index."""
    for sequence_len in SEQUENCE_LENS:
        num_rows = 2**25 // sequence_len
        for mode in ("crop", "split"):
            [seconds] = _in_turns(lambda mode=mode, t=sequence_len, n=num_rows: pack(lengths, t + 1, mode, num_rows=n))
            _print(f"packing {mode}, T={sequence_len}", num_rows * sequence_len, "tokens", seconds)


def bench_reading(cache: TokenCache, tokenizer: Tokenizer, folder: Path) -> None:
    """Rows from the cache, in steps of 32 rows, and what memory they leave behind."""
    for sequence_len in SEQUENCE_LENS:
        num_rows = max(32, min(8_192, cache.num_tokens // sequence_len) // 32 * 32)
        rows = packed_rows(cache, sequence_len, tokenizer.bos_id, "split", folder, num_rows=num_rows)

        def read(rows: Rows = rows) -> None:
            for first in range(0, len(rows), 32):
                rows.read(range(first, first + 32))

        [seconds] = _in_turns(read)
        _print(f"reading rows, T={sequence_len}", num_rows * sequence_len, "tokens", seconds)
    rows = packed_rows(cache, SEQUENCE_LENS[0], tokenizer.bos_id, "split", folder, num_rows=2 * ROWS_OF_MEMORY + 32)
    for first in range(0, ROWS_OF_MEMORY, 32):
        rows.read(range(first, first + 32))
    before = _own_memory()
    for first in range(ROWS_OF_MEMORY, 2 * ROWS_OF_MEMORY, 32):
        rows.read(range(first, first + 32))
    print(f"memory after {ROWS_OF_MEMORY:,} more rows: {(_own_memory() - before) / 2**20:+.1f} MiB")


def bench_streaming(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    """From nothing to the first row and to the last one; then the last row of rows that have just been opened."""
    settings = {"sequence_len": 2048, "mode": "split", "num_rows": 4_000}

    def open_rows() -> Rows:
        return streamed_rows(source.shards("train"), tokenizer, folder / "streamed", **settings)  # type: ignore[arg-type]

    begin = time.perf_counter()
    rows = open_rows()
    rows.read([0])
    print(f"streaming: the first row after {time.perf_counter() - begin:.1f} s, ", end="")
    rows.read([settings["num_rows"] - 1])  # type: ignore[operator,list-item]
    print(f"the last one after {time.perf_counter() - begin:.1f} s")
    milliseconds = []
    for _ in range(REPEATS):
        rows = open_rows()
        begin = time.perf_counter()
        rows.read([len(rows) - 1])
        milliseconds.append(1e3 * (time.perf_counter() - begin))
    print(
        f"seeking to the last row: {statistics.median(milliseconds):.1f} ms "
        f"(n={REPEATS}, {min(milliseconds):.1f} … {max(milliseconds):.1f})"
    )


def _own_memory() -> int:
    """Bytes of this process that are not files: pages of mapped files can be dropped by the system at any time."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def _in_turns(*runs: Callable[[], object]) -> list[list[Seconds]]:
    """The seconds of each, measured one after the other again and again, after a turn that is not counted."""
    seconds: list[list[Seconds]] = [[] for _ in runs]
    for turn in range(REPEATS + 1):
        for run, found in zip(runs, seconds, strict=True):
            begin = time.perf_counter(), time.process_time()
            run()
            if turn:
                found.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return seconds


def _print(what: str, amount: int, unit: str, seconds: list[Seconds]) -> None:
    rates, cpu_rates = (sorted(amount / 1e6 / each[clock] for each in seconds) for clock in (0, 1))
    print(
        f"{what}: {statistics.median(rates):,.2f} million {unit}/s "
        f"(n={len(rates)}, {rates[0]:,.2f} … {rates[-1]:,.2f}), {statistics.median(cpu_rates):,.2f} a CPU second "
        f"({cpu_rates[0]:,.2f} … {cpu_rates[-1]:,.2f})"
    )


if __name__ == "__main__":
    main(*sys.argv[1:2])
