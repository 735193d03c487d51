"""How fast the engine generates with a model of the demo's shape: decode tokens a second. Works without any download.

    python benchmarks/bench_engine.py [--dtype bfloat16] [--quantize int8 | --compile]

The model has its first weights; no stop token ends an answer, so every row is generated to the end. What is measured is
what `nanochat-pl bench` measures, for prompts of one length. Prints plain lines: median of several runs and their
spread.
"""

from __future__ import annotations

import argparse
import itertools
from typing import NamedTuple

import torch

from nanochat_pl.engine import Engine
from nanochat_pl.engine.bench import BenchSettings, measure_batch, measure_limits
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT, TORCH_DTYPES
from nanochat_pl.model.init import init_weights
from nanochat_pl.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

VOCAB_SIZE = 4096
SETTINGS = BenchSettings(batch_sizes=(1, 32), prompt_tokens=56, new_tokens=128)


class BenchBundle(NamedTuple):
    """What the engine reads of a bundle."""

    net: GPT
    tokenizer: Tokenizer


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantize", choices=("int8",))
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    bundle = demo_sized_bundle()
    bundle.net.set_compute_dtype(TORCH_DTYPES[given.dtype])
    engine = Engine(bundle, given.quantize, given.compile)
    print(f"engine: {torch.get_num_threads()} threads, {given.dtype}, {SETTINGS.new_tokens} new tokens a prompt")
    limits = measure_limits(engine)
    for size in SETTINGS.batch_sizes:
        result = measure_batch(engine, SETTINGS, size, limits)
        print(
            f"engine: {size} prompts: {result.tokens_per_second} tokens/s written, first token after"
            f" {result.first_token_ms} ms, n={SETTINGS.repeats}"
        )


def demo_sized_bundle() -> BenchBundle:
    """A model of depth 4 and width 256 with its first weights, and a tokenizer of pairs of bytes for its vocabulary."""
    settings = ModelSettings(depth=4, aspect_ratio=64, head_dim=64, sequence_len=256)
    net = GPT(resolve_model(settings, VOCAB_SIZE, compute_dtype="float32")).materialise()
    tokens = [bytes([i]) for i in range(256)] + [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
    ranks = {token: i for i, token in enumerate(tokens[: VOCAB_SIZE - len(SPECIAL_TOKENS)])}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return BenchBundle(init_weights(net).eval(), Tokenizer.from_ranks(ranks, SPLIT_PATTERN, specials))


if __name__ == "__main__":
    main()
