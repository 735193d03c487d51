"""How fast data becomes rows: packing, tokenizing, reading, seeking. Works without any download.

    python benchmarks/bench_data.py [FILE, FOLDER or GLOB of text]

Without a path the text is the documentation found on this machine (python_docs). CPU seconds of this process say more
than the clock where others use the machine too.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _report import Seconds, in_turns, parser_of, ratio, report, spread, spreads

from nanochat_pl.data.cache.tokens import TokenCache, build_token_cache
from nanochat_pl.data.packing.packer import pack
from nanochat_pl.data.packing.rows import Rows, packed_rows, streamed_rows
from nanochat_pl.data.sources.base import DataSettings, Source
from nanochat_pl.data.sources.open import open_source
from nanochat_pl.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer

TOKENIZER_CHARS = 8_000_000
SEQUENCE_LENS = (256, 2048)


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__, repeats=2, vocab_size=32_768, tokens=2**22, memory_rows=5_000)
    parser.add_argument("path", nargs="?", help="file, folder or glob of text")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = open_source(DataSettings(name="local", path=given.path) if given.path else DataSettings(), folder)
        texts = [text for shard in source.shards("train") for text in shard.documents()]
        num_chars = list(itertools.accumulate(map(len, texts)))
        for_tokenizer = texts[: sum(total <= TOKENIZER_CHARS for total in num_chars) + 1]
        tokenizer = train_tokenizer(for_tokenizer, TokenizerSettings(vocab_size=given.vocab_size))
        found = {
            "settings": {"source": source.name, "documents": len(texts), "characters": num_chars[-1], **vars(given)},
            **bench_tokenizing(source, texts, tokenizer, folder, given.repeats),
        }
        cache = build_token_cache(source, "train", tokenizer, folder)
        found["million tokens a second"] = {
            **bench_packing(cache.lengths, given),
            **bench_reading(cache, tokenizer, folder, given),
        }
        found["MiB after as many rows again"] = memory_of_reading(cache, tokenizer, folder, given.memory_rows)
        found["streaming, seconds"] = bench_streaming(source, tokenizer, folder, given)
    report("data", given.repeats, found)


def bench_tokenizing(
    source: Source, texts: list[str], tokenizer: Tokenizer, folder: Path, repeats: int
) -> dict[str, Any]:
    """Files to cache, with nothing kept from before, against tiktoken alone on the texts in memory: the limit."""
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

    seconds = in_turns(repeats, {"tiktoken alone": alone, "building the cache": build})
    return {
        "speed of building the cache over that of tiktoken alone": ratio(
            seconds, "tiktoken alone", "building the cache"
        ),
        "tokenizing, million tokens a second": {name: rates(num_tokens, times) for name, times in seconds.items()},
    }


def bench_packing(lengths: np.ndarray, given: argparse.Namespace) -> dict[str, Any]:
    """Lengths to row index."""
    found = {}
    for sequence_len, mode in itertools.product(SEQUENCE_LENS, ("crop", "split")):
        num_rows = given.tokens // sequence_len
        seconds = in_turns(
            given.repeats,
            {"pack": lambda m=mode, t=sequence_len, n=num_rows: pack(lengths, t + 1, m, num_rows=n)},
        )
        found[f"packing {mode}, T={sequence_len}"] = rates(num_rows * sequence_len, seconds["pack"])
    return found


def bench_reading(cache: TokenCache, tokenizer: Tokenizer, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Rows from the cache, in steps of 32 rows."""
    found = {}
    for sequence_len in SEQUENCE_LENS:
        num_rows = max(32, min(8_192, cache.num_tokens // sequence_len) // 32 * 32)
        rows = packed_rows(cache, sequence_len, tokenizer.bos_id, "split", folder, num_rows=num_rows)
        seconds = in_turns(given.repeats, {"read": lambda rows=rows: read(rows, range(len(rows)))})
        found[f"reading rows, T={sequence_len}"] = rates(num_rows * sequence_len, seconds["read"])
    return found


def memory_of_reading(cache: TokenCache, tokenizer: Tokenizer, folder: Path, num_rows: int) -> float:
    """MiB that a process holds more after as many rows again."""
    rows = packed_rows(cache, SEQUENCE_LENS[0], tokenizer.bos_id, "split", folder, num_rows=2 * num_rows + 32)
    read(rows, range(num_rows))
    before = _own_memory()
    read(rows, range(num_rows, 2 * num_rows))
    return (_own_memory() - before) / 2**20


def read(rows: Rows, numbers: range) -> None:
    for first in numbers[::32]:
        rows.read(range(first, first + 32))


def bench_streaming(source: Source, tokenizer: Tokenizer, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """From nothing to the first row and to the last one; then the last row of rows that have just been opened."""
    num_rows = max(1, given.tokens // 2048 // 4)

    def open_rows() -> Rows:
        return streamed_rows(
            source.shards("train"), tokenizer, folder / "streamed", sequence_len=2048, mode="split", num_rows=num_rows
        )

    begin = time.perf_counter()
    rows = open_rows()
    rows.read([0])
    first = time.perf_counter() - begin
    rows.read([num_rows - 1])
    last = time.perf_counter() - begin
    opened = [open_rows() for _ in range(given.repeats + 1)]
    seconds = in_turns(given.repeats, {"seek": lambda: opened.pop().read([num_rows - 1])})
    return {"first row": first, "last row": last, "seeking to the last row": spreads(seconds, 1)["seek"]}


def rates(amount: int, seconds: list[Seconds]) -> dict[str, Any]:
    """Millions a second, by the clock and by CPU seconds."""
    return {
        clock: spread([amount / 1e6 / each[which] for each in seconds])
        for which, clock in enumerate(("clock", "processors"))
    }


def _own_memory() -> int:
    """Bytes of this process that are not files: pages of mapped files can be dropped by the system at any time."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


if __name__ == "__main__":
    main()
