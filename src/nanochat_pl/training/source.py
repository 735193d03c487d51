"""What a stage's settings say of its text, made concrete: data=auto becomes what the plan comes to, once for a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from nanochat_pl.common import together
from nanochat_pl.common.console import say
from nanochat_pl.common.run_folder import StageFolder
from nanochat_pl.data.auto import (
    Choice,
    choice_of,
    choose_data,
    explain_choice,
    read_choice,
    with_choice,
    write_choice,
)
from nanochat_pl.data.opening import open_source
from nanochat_pl.data.sources import DataSettings, Source
from nanochat_pl.planning import make_plan
from nanochat_pl.training.settings import TrainConfig


def tokens_planned(config: TrainConfig) -> Callable[[int | None], int]:
    """What says how many tokens pretraining takes with these settings, given how many are at hand (None: not known).

    No device has a say in it, so all stages and all machines come to the same.
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
    stage = folder.parent("base") if config.stage.trains_on_conversations else folder
    if choice := read_choice(stage.chosen_source):
        return with_choice(config.data, choice).without_download()
    return choose_data(config.data, tokens_planned(config), cache).without_download()


def open_for_tokenizer(config: TrainConfig, cache: Path) -> Source:
    """The source of the tokenizer stage: the files that pretraining with these settings takes, so that both stages have
    the same; of those that are fetched when they are read, as many as the tokenizer reads."""
    on_hub = any(part.is_on_hub for part in (config.data, *config.data.parts.values()))
    return open_source(config.data, cache, tokens_planned(config)(None) if on_hub else None)


def with_chosen_data(config: TrainConfig, folder: StageFolder, cache: Path, goes_on: bool) -> TrainConfig:
    """The settings of a stage that is to train, with data=auto made concrete and said; the same on all processes.

    Args:
        folder: of the stage, where the choice is recorded.
        goes_on: whether the stage has begun: then it keeps to what it was begun with.

    Raises:
        UserError: the docstrings cannot be read, or the plan is wrong.
    """
    if config.data.name != "auto":
        return config

    def choose() -> Choice:
        if config.stage.trains_on_conversations:  # it reads no text, and is recorded with that of its base stage
            return read_choice(folder.parent("base").chosen_source) or "docs"
        if goes_on and (before := read_choice(folder.chosen_source)):
            return before
        planned = tokens_planned(config)
        data = choose_data(config.data, planned, cache)
        say(explain_choice(data, planned, cache))
        write_choice(folder.chosen_source, data)
        return choice_of(data)

    return dataclasses.replace(config, data=with_choice(config.data, together.by_main(choose)))
