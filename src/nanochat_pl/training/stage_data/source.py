"""What a stage's settings say of its text, made concrete: data=auto becomes what the plan comes to, once for a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from nanochat_pl.bundle.stage_info import load_stage_info
from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.run_dir import StageFolder
from nanochat_pl.data.sources.auto import (
    Choice,
    choice_of,
    choose_data,
    explain_choice,
    read_choice,
    with_choice,
    write_choice,
)
from nanochat_pl.data.sources.base import DataSettings, Source
from nanochat_pl.data.sources.open import open_source
from nanochat_pl.data.sources.run_corpus import RunCorpus, corpus_of_bundle
from nanochat_pl.distributed import collectives, coordination
from nanochat_pl.planning import make_plan
from nanochat_pl.training.config import TrainConfig
from nanochat_pl.training.stage_data.inherit import parent_folder


def tokens_planned(config: TrainConfig) -> Callable[[int | None], int]:
    """What says how many tokens pretraining takes with these settings, given how many are at hand (None: not known).

    It does not depend on the device, so all stages and all machines come to the same.
    """

    def tokens(at_hand: int | None) -> int:
        plan = make_plan(
            config.model, config, config.optim, vocab_size=config.tokenizer.vocab_size, tokens_at_hand=at_hand
        )
        return int(plan["total_tokens"])

    return tokens


def chosen_data(config: TrainConfig, folder: StageFolder, cache: Path) -> DataSettings:
    """The settings of the text, of data=auto what the stage was begun with, else what the plan comes to, and nothing is
    fetched then: for who looks at it and trains nothing."""
    if config.data.name != "auto":
        return config.data
    stage = folder.parent("base") if "data" in config.stage.definition.inherits else folder
    if choice := read_choice(stage.chosen_source):
        return with_choice(config.data, choice).without_download()
    return choose_data(config.data, tokens_planned(config), cache).without_download()


def corpus_of_stage(config: TrainConfig, folder: StageFolder, cache: Path, resuming: bool) -> RunCorpus:
    """The corpus of docstrings of a stage: that which it was begun with, else the parent's, else of what is installed.

    Args:
        resuming: whether the stage has begun.

    Raises:
        UserError: the parent's record is damaged.
    """
    stage = config.stage.definition
    if stage.starts_from_model:
        parent = parent_folder(config, folder)
    else:  # base need not have one: it makes a tokenizer on its way
        tokenizer = folder.parent("tokenizer")
        parent = tokenizer if stage.has_model and tokenizer.status == "finished" else None
    inherited = None
    if parent is not None:
        inherited = corpus_of_bundle(load_stage_info(parent.bundle).data, f"{parent.bundle}/stage.json")
    # Another process than the main one comes after it, and has what that has recorded.
    begun = resuming or not collectives.is_rank_zero()
    return RunCorpus(cache, folder.chosen_corpus, begun, inherited, config.resume_with_changes)


def open_for_tokenizer(config: TrainConfig, cache: Path, corpus: RunCorpus | None = None) -> Source:
    """The source of the tokenizer stage: the files that pretraining with these settings takes, so that both stages have
    the same; of those that are fetched when they are read, as many as the tokenizer reads."""
    on_hub = any(part.is_on_hub for part in config.data.opened)
    return open_source(config.data, cache, tokens_planned(config)(None) if on_hub else None, corpus=corpus)


def with_chosen_data(
    config: TrainConfig, folder: StageFolder, cache: Path, resuming: bool, corpus: RunCorpus | None = None
) -> TrainConfig:
    """The settings of a stage that is to train, with data=auto made concrete and said; the same on all processes.

    Args:
        folder: of the stage, where the choice is recorded.
        resuming: whether the stage has begun: then it keeps to what it was begun with.
        corpus: the run's; None: that of the packages installed now.

    Raises:
        UserError: the docstrings cannot be read, or the plan is wrong.
    """
    if config.data.name != "auto":
        return config

    def choose() -> Choice:
        if "data" in config.stage.definition.inherits:  # it is recorded with the text of its base stage
            return read_choice(folder.parent("base").chosen_source) or "docs"
        if resuming and (before := read_choice(folder.chosen_source)):
            return before
        planned = tokens_planned(config)
        data = choose_data(config.data, planned, cache, corpus)
        rank_zero_print(explain_choice(data, planned, cache, corpus))
        write_choice(folder.chosen_source, data)
        return choice_of(data)

    return dataclasses.replace(config, data=with_choice(config.data, coordination.run_on_rank_zero(choose)))
