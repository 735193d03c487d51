"""How fast the engine writes: decode tokens a second for 1 and for 32 different prompts. Works without any download.

    python benchmarks/bench_engine.py

The model has the shape of the demo and its first weights; no stop token ends an answer, so every row writes to the end.
Reading the prompts is timed apart. Prints plain lines: median of several runs and their spread.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import NamedTuple

import torch

from nanochat_pl.engine import Engine
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

REPEATS = 5
VOCAB_SIZE = 4096
NEW_TOKENS = 128
PROMPT_LENGTHS = (16, 96)
BATCHES = (1, 32)


class BenchBundle(NamedTuple):
    """What the engine reads of a bundle."""

    net: GPT
    tokenizer: Tokenizer


def main() -> None:
    """Measure everything and print it."""
    engine = Engine(demo_sized_bundle())
    print(f"engine: {torch.get_num_threads()} threads, {engine.net.compute_dtype}, {NEW_TOKENS} new tokens a prompt")
    for count in BATCHES:
        read, write = bench_decoding(engine, count)
        print(f"engine: {count} prompts: {_spread(write)} tokens/s written, {_spread(read)} tokens/s of prompts read")


def demo_sized_bundle() -> BenchBundle:
    """A model of depth 4 and width 256 with its first weights, and a tokenizer of pairs of bytes for its vocabulary."""
    settings = ModelSettings(depth=4, aspect_ratio=64, head_dim=64, sequence_len=256)
    net = GPT(resolve_model(settings, VOCAB_SIZE, compute_dtype="float32")).materialise()
    tokens = [bytes([i]) for i in range(256)] + [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
    ranks = {token: i for i, token in enumerate(tokens[: VOCAB_SIZE - len(SPECIAL_TOKENS)])}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return BenchBundle(init_weights(net).eval(), Tokenizer.from_ranks(ranks, SPLIT_PATTERN, specials))


def bench_decoding(engine: Engine, count: int, repeats: int = REPEATS) -> tuple[list[float], list[float]]:
    """Tokens a second over ``count`` different prompts: of the prompts when they are read, of the answers after it."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(*PROMPT_LENGTHS, (count,), generator=generator).tolist()
    prompts = [torch.randint(256, (length,), generator=generator).tolist() for length in lengths]
    reads, writes = [], []
    for _ in range(repeats + 1):
        first, whole = (_seconds(engine, prompts, new_tokens) for new_tokens in (1, NEW_TOKENS))
        reads.append(sum(lengths) / first)
        writes.append(count * (NEW_TOKENS - 1) / (whole - first))
    return reads[1:], writes[1:]  # the first run warms up


def _seconds(engine: Engine, prompts: list[list[int]], new_tokens: int) -> float:
    start = time.perf_counter()
    results = engine.generate(prompts, max_tokens=new_tokens, stop_ids=(), max_batch=len(prompts))
    seconds = time.perf_counter() - start
    assert all(len(result.ids) == new_tokens for result in results)
    return seconds


def _spread(rates: list[float]) -> str:
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} … {max(rates):,.0f}, n={len(rates)})"


if __name__ == "__main__":
    main()
