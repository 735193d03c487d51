"""Tokenizes a part of the text that a stage base would read, so that several machines fill one cache together.

nanochat-pl tokenize data=climbmix run=big shards=0/8

Every machine gets a number of its own (shards=0/8 … 7/8) and the same paths.cache and paths.runs. What is in the cache
already is not tokenized again; a training may begin meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from nanochat_pl.cli.train import place_of
from nanochat_pl.common.console import next_steps, progress, rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.imports import loading_libraries
from nanochat_pl.common.paths import cache_folder, run_keys
from nanochat_pl.common.schema import setting
from nanochat_pl.config.compose import Composed
from nanochat_pl.config.experiment import compose_step
from nanochat_pl.config.overrides import take_key
from nanochat_pl.data.cache.tokens import ShardToBuild, token_cache_to_build, tokenized
from nanochat_pl.data.hub.errors import library_heard
from nanochat_pl.data.sources.mixture import MixedSource
from nanochat_pl.data.sources.open import open_source
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.training.config import TrainConfig


@dataclass(frozen=True)
class TokenizeConfig(TrainConfig):
    """The root of configs/tokenize.yaml: the keys of train, and which part of the shards."""

    shards: str = setting("0/1", "Which part of the shards: I/N, the I-th of N, counted from 0.")

    def __post_init__(self) -> None:
        super().__post_init__()
        part_of_shards(self.shards)


Config = TokenizeConfig
HELP_KEYS = ("data.path", "paths.cache", "paths.runs")
EXTRA_KEYS = {"experiment=NAME": "Take the settings of an experiment file."}


def part_of_shards(text: str) -> tuple[int, int]:
    """``3/8`` as (3, 8).

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise UserError(f"shards={text}: must be I/N with I from 0 to N - 1, as shards=0/8.")
    return int(match[1]), int(match[2])


def run(arguments: Sequence[str]) -> int:
    """The command."""
    stage, _ = take_key(arguments, "stage")
    if stage and stage != "base":
        raise UserError(f"stage={stage}: only the text of stage=base is tokenized ahead.", "Leave it out.")
    composed: Composed[TokenizeConfig] = compose_step("tokenize", "base", TokenizeConfig, arguments)
    config, cache = composed.config, cache_folder(composed.config.paths)
    folder = place_of(Composed[TrainConfig](config, given=composed.given, experiment=composed.experiment))
    made_by = folder.parent("tokenizer")
    if made_by.status != "finished":
        raise UserError(
            f"{made_by.path}: there is no tokenizer yet, and all machines need the same one.",
            "Train it first, once, with the same keys: nanochat-pl train stage=tokenizer …",
        )
    with loading_libraries():
        from nanochat_pl.bundle.bundle import load_tokenizer
        from nanochat_pl.training.stage_data.source import chosen_data, corpus_of_stage
    corpus = corpus_of_stage(config, folder, cache, resuming=False)
    source = open_source(chosen_data(config, folder, cache), cache, None, None, corpus)
    rank_zero_print(source.describe())
    parts = source.parts.values() if isinstance(source, MixedSource) else [source]
    shards = [shard for part in parts for shard in (*part.shards("train"), *part.shards("val"))]
    number, count = part_of_shards(config.shards)
    own, tokenizer = shards[number::count], load_tokenizer(made_by.bundle)
    _tokenize(token_cache_to_build(own, tokenizer, cache)[1], tokenizer, f"{len(own):,} of {len(shards):,}")
    keys = run_keys(folder.run, folder.runs)
    next_steps([("train on it, with the same keys", f"nanochat-pl train stage=base {keys} …")])
    return 0


def _tokenize(shards: Sequence[ShardToBuild], tokenizer: Tokenizer, what: str) -> None:
    there, num_tokens = sum(each.is_there() for each in shards), 0
    bar = progress("tokenizing", len(shards), "shards")
    with library_heard(), bar as advance, closing(tokenized(shards, tokenizer)) as done:
        for shard in done:
            num_tokens += shard.num_tokens
            advance(1)
    rank_zero_print(f"Tokenized: {what} shards, {num_tokens:,} tokens; {there:,} of them were there before.")
