"""How fast the engine generates with a model of the demo's shape: decode tokens a second. Works without any download.

    python benchmarks/bench_engine.py [--dtype bfloat16] [--quantize int8 | --compile]

The model has its first weights; no stop token ends an answer, so every row is generated to the end. What is measured is
what `nanochat-pl bench` measures, for prompts of one length.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from _report import parser_of, report

from nanochat_pl.engine import Engine
from nanochat_pl.engine.bench import as_plain, measure_batch, measure_limits
from nanochat_pl.engine.settings import BenchSettings
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT, TORCH_DTYPES
from nanochat_pl.model.init import init_weights
from nanochat_pl.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

VOCAB_SIZE = 4096


class BenchBundle(NamedTuple):
    """What the engine reads of a bundle."""

    net: GPT
    tokenizer: Tokenizer


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__, repeats=5, new_tokens=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantize", choices=("int8",))
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    settings = BenchSettings((1, 32), prompt_tokens=56, new_tokens=given.new_tokens, repeats=given.repeats)
    bundle = demo_sized_bundle()
    bundle.net.set_compute_dtype(TORCH_DTYPES[given.dtype])
    engine = Engine(bundle, given.quantize, given.compile)
    reached = measure_limits(engine)
    found = {
        f"{size} prompts": as_plain(measure_batch(engine, settings, size, reached)) for size in settings.batch_sizes
    }
    report("engine", settings.repeats, {"settings": vars(given), **found})


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
