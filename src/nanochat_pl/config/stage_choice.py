"""``stage=NAME`` of a stage that has no file in configs/stage, and ``stage=package.module.Class``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nanochat_pl.common.errors import UserError
from nanochat_pl.config import config_dir
from nanochat_pl.config.overrides import Setting
from nanochat_pl.training.stages.registry import all_stages, stage_named


def name_of_stage(chosen: str) -> str:
    """The name of a stage that may have been chosen by its class. What is no stage stays as it is."""
    return stage_named(chosen, "stage").name if "." in chosen else chosen


def with_stage_file(settings: Sequence[Setting], problems: list[str]) -> list[Setting]:
    """The settings, in which the choice of a stage is that of a file: without one of its own, the file that the stage
    takes, with the stage's name and no parent laid over it."""
    choices = [setting for setting in settings if setting.key == "stage" and setting.is_choice]
    if not choices or not isinstance(choices[-1].value, str):
        return [*settings]
    choice, others = choices[-1], [setting for setting in settings if setting not in choices]
    try:
        name = name_of_stage(choice.value)
    except UserError as error:
        problems += error.problems
        return others
    if name in config_dir.groups()["stage"] or name not in all_stages():  # no stage: said of the choice
        return [replace(choice, value=name), *others]
    values = {"stage.name": name, "stage.parent": None}
    own = [replace(choice, key=key, value=value, is_choice=False) for key, value in values.items()]
    return [replace(choice, value=stage_named(name).config_file), *own, *others]
