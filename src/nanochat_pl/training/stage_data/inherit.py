"""What a stage takes over from its parent: the tokenizer's settings, and after base also those of model and data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from typing import Any

from nanochat_pl.bundle.stage_info import load_stage_info
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.run_dir import STAGES, StageFolder, stages_in
from nanochat_pl.common.schema import build, to_plain
from nanochat_pl.data.sources.auto import read_choice, with_choice
from nanochat_pl.data.sources.base import DataSettings
from nanochat_pl.model.config import ModelSettings
from nanochat_pl.training.config import TrainConfig
from nanochat_pl.training.stages.registry import all_stages, parents_of

# A matter of the machine, or of the files and rows of this stage: it may be given anew.
FREE = ("model.compute_dtype", "model.document_mask", "model.restart_positions", "data.max_bad_fraction")


def parent_name(config: TrainConfig, folder: StageFolder) -> str | None:
    """The stage that this one starts from: as the settings say, else the last of the possible ones that is finished.

    Raises:
        UserError: the run has a stage of somebody's own, of which nobody here knows whether it is one of these.
    """
    stage = config.stage.definition
    if config.stage.parent is not None or not stage.starts_from_model:
        return config.stage.parent
    run_dir, possible = folder.runs / folder.parent_run, parents_of(stage)
    finished = [name for name in possible if folder.parent(name).status == "finished"]
    unknown = [name for name in stages_in(run_dir) if name not in STAGES and name not in all_stages()]
    if unknown:
        raise UserError(
            f"stage.parent: {run_dir} has the stage {unknown[0]}, which this command does not know.",
            f"Say what {stage.name} starts from: stage.parent={(finished or possible)[-1]}, or"
            " stage.parent=package.module.Class.",
        )
    return finished[-1] if finished else possible[0]


def parent_folder(config: TrainConfig, folder: StageFolder) -> StageFolder | None:
    """The finished stage that this one starts from. None where it has none: a tokenizer that is not there is made.

    Raises:
        UserError: it is not finished.
    """
    name = parent_name(config, folder)
    if name is None:
        return None
    parent = folder.parent(name)
    if parent.status != "finished":
        if name == "tokenizer":
            return None
        state, fix = "is not there", "Train it first"
        if parent.status == "unfinished":
            state, fix = "is not finished", "Let it end, or finish it"
        raise UserError(
            f"{parent.path}: the {name} stage to start from {state}.",
            fix=f"{fix}: nanochat-pl train stage={name} run={parent.run} …",
        )
    return parent


def inherited(config: TrainConfig, folder: StageFolder, given: Set[str]) -> TrainConfig:
    """The settings with those of the parent in the groups that it decides.

    Args:
        config: as composed; its own values in these groups are defaults, but for what is given.
        folder: of the stage.
        given: dotted keys that a person set: they may repeat what the parent has, not change it.

    Raises:
        UserError: there is no finished parent, or a key contradicts it; every such key is named.
    """
    parent = parent_folder(config, folder)
    if parent is None:
        return config
    settings, groups = load_stage_info(parent.bundle).settings, {}
    # What data=auto came to for the parent is what is compared: its bundle has the concrete settings.
    inherits = config.stage.definition.inherits
    choice = read_choice(folder.parent("base").chosen_source) if "data" in inherits else None
    if choice is not None:
        config = dataclasses.replace(config, data=with_choice(config.data, choice))
    problems: list[str] = []
    for group in inherits:
        own, was = getattr(config, group), settings.get(group, {})
        if not isinstance(was, Mapping):
            raise UserError(f"{parent.bundle}/stage.json: settings.{group}={was!r}: must be a group of settings.")
        if group == "model" and was:
            was = {**_defaults(), **was}
        merged = _merged(was, to_plain(own), group, given, parent.stage, problems)
        groups[group] = build(type(own), merged, f"{parent.bundle}/stage.json: settings.{group}")
    if isinstance(data := groups.get("data"), DataSettings) and not config.stage.definition.trains_on_conversations:
        problems += [
            f"{parent.bundle}: names the class {name!r} as data; what a bundle names is never imported: name it again,"
            f" data.target={name}."
            for name in data.own_classes
            if name not in config.data.own_classes
        ]
    if problems:
        raise UserError(problems, fix="Leave these keys out, or begin another run with run=NEW.")
    return dataclasses.replace(config, **groups)


def _defaults() -> dict[str, Any]:
    """What keys of the architecture are that a bundle does not tell: it is older than they are."""
    return {key: value for key, value in to_plain(ModelSettings()).items() if key != "init"}


def _merged(
    was: Mapping[str, Any], now: Mapping[str, Any], where: str, given: Set[str], stage: str, problems: list[str]
) -> dict[str, Any]:
    """What the parent has, with what may be given anew; a given key that says otherwise goes to ``problems``."""
    merged = dict(was)
    for key, value in now.items():
        name = f"{where}.{key}"
        if isinstance(value, Mapping) and isinstance(was.get(key), Mapping):
            # Of a group within a group, a config file gives all or nothing.
            inner = {f"{name}.{each}" for each in value} if name in given else set()
            merged[key] = _merged(was[key], value, name, given | inner, stage, problems)
        elif name in given and name in FREE:
            merged[key] = value
        elif name in given and key in was and was[key] != value:
            problems.append(f"{name}={value}: the {stage} stage was trained with {was[key]}.")
    return merged
