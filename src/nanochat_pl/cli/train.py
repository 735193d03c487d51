"""Trains one stage of a run; the same command again goes on where it stopped.

    nanochat-pl train stage=base model.depth=4 max_steps=200
    nanochat-pl train stage=sft run=d4
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from nanochat_pl.cli.compose import Composed, compose
from nanochat_pl.cli.experiment import read_experiment, settings_of_step
from nanochat_pl.cli.overrides import Setting, split_override
from nanochat_pl.cli.records import read_settings, write_records
from nanochat_pl.common.console import next_steps, say
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.run_folder import StageFolder, fresh_stage_folder, only_run_with, stage_folder
from nanochat_pl.training.settings import TrainConfig

Config = TrainConfig
# What --help shows first, besides the keys at the root.
HELP_KEYS = ("model.depth", "model.sequence_len", "data.path", "trainer.accelerator", "paths.runs")
# Keys that change neither what is learnt nor from what: they may differ when a run goes on.
FREE_TO_CHANGE = ("trainer", "paths", "logger", "callbacks", "device_batch_size", "run", "resume", "check_only")


def run(arguments: Sequence[str]) -> int:
    """The verb."""
    if "-m" in arguments or "--multirun" in arguments:
        from nanochat_pl.cli.sweep import run_sweep

        return run_sweep("train", [argument for argument in arguments if argument not in ("-m", "--multirun")])
    composed = compose_train(arguments)
    config, folder = composed.config, place_of(composed)
    if config.check_only:
        return _check(config)
    if folder.status != "absent":
        require_same_settings(folder, composed)
    if folder.status == "finished":
        say(f"{folder.path}: is finished. resume=never begins a new run beside it.")
        return 0
    from nanochat_pl.training.run import train_stage
    from nanochat_pl.training.stopping import StopRequested

    folder.create()
    with folder.locked():
        write_records(folder, composed)
        try:
            train_stage(config, folder)
        except StopRequested as stop:
            say(f"Stopped after step {stop.step:,}. The same command goes on from there.")
            return 128 + stop.signum
    next_steps(_next_commands(folder))
    return 0


def compose_train(overrides: Sequence[str]) -> Composed[TrainConfig]:
    """The settings of a stage: group files, then the experiment's sections for that stage, then the command line."""
    name, rest = take_key(overrides, "experiment")
    step, _ = take_key(rest, "stage")
    if not name:
        return compose("train", TrainConfig, rest)
    experiment, path = read_experiment(name)
    before = [Setting("stage", step or "base", is_choice=True)]
    before += settings_of_step(experiment, path, step or "base", TrainConfig)
    return compose("train", TrainConfig, rest, before, experiment=Path(name).stem)


def take_key(overrides: Sequence[str], key: str) -> tuple[str, list[str]]:
    """The last value given for a key that has to be known before the others, and the overrides without it."""
    values = [raw for found, raw, problem in map(split_override, overrides) if found == key and not problem]
    rest = [text for text in overrides if split_override(text)[0] != key or split_override(text)[2]]
    return (values[-1] if values else ""), rest


def place_of(composed: Composed[TrainConfig]) -> StageFolder:
    """The folder of the stage: of the run that is named, else of the experiment's, else of the depth's.

    A stage that builds on a trained one takes the only run that has it.
    """
    config = composed.config
    runs = Path(config.paths.runs)
    name = config.run or composed.experiment
    if not name and config.stage.parent not in (None, "tokenizer"):
        name = only_run_with(runs, str(config.stage.parent))
        say(f"run={name}: the only run with a finished stage {config.stage.parent}.")
    name = name or f"d{config.model.depth}"
    if config.resume == "never":
        return fresh_stage_folder(runs, name, config.stage.name)
    return stage_folder(runs, name, config.stage.name)


def require_same_settings(folder: StageFolder, composed: Composed[TrainConfig]) -> None:
    """Refuse to go on with a run under other settings: its result would be neither of the two.

    Raises:
        UserError: names each key with both values.
    """
    before = read_settings(folder)
    if before is None:
        return
    now = composed.plain()
    differences = [
        f"{folder.path}: was begun with {key}={_show(before.get(key))}, not {key}={_show(now.get(key))}."
        for key in sorted(_flat(before).keys() | _flat(now).keys())
        if key.split(".")[0] not in FREE_TO_CHANGE and _flat(before).get(key) != _flat(now).get(key)
    ]
    if differences:
        raise UserError(differences, "Repeat its settings; or begin a new run with run=NAME or resume=never.")


def _check(config: TrainConfig) -> int:
    from nanochat_pl.cli.plan import print_plan

    print_plan(config)
    say("check_only=true: the settings are right; nothing was trained.")
    return 0


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _show(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).split("\n")[0]


def _next_commands(folder: StageFolder) -> list[tuple[str, str]]:
    run = folder.run
    following = {
        "tokenizer": ("train a model", f"nanochat-pl train stage=base run={run}"),
        "base": ("make it a chat model", f"nanochat-pl train stage=sft run={run}"),
        "sft": ("talk to it", f"nanochat-pl chat run={run}"),
    }
    steps = [following[folder.stage]] if folder.stage in following else []
    return [*steps, ("tables and plots", f"nanochat-pl report run={run}")]
