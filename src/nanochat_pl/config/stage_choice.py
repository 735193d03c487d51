"""``stage=NAME`` of a stage that has no file in configs/stage, and ``package.module.Class`` in place of a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nanochat_pl.common.errors import UserError
from nanochat_pl.config import config_dir
from nanochat_pl.config.overrides import Setting
from nanochat_pl.training.stages.registry import all_stages, import_stage, stage_named


def name_of_stage(chosen: str, key: str = "stage") -> str:
    """The name of a stage that a user may have named by its class. What is no stage stays as it is."""
    return import_stage(chosen, key).name if "." in chosen else chosen


def with_stage_files(settings: Sequence[Setting], problems: list[str]) -> list[Setting]:
    """The settings with stages by their names. A stage without a file of its own is the file that it takes, with its
    name and no parent laid over it."""
    choice, others = None, []
    for setting in settings:
        is_choice = setting.key == "stage" and setting.is_choice
        if isinstance(setting.value, str) and (is_choice or setting.key == "stage.parent"):
            try:
                setting = replace(setting, value=name_of_stage(setting.value, setting.key))
            except UserError as error:
                problems += error.problems
                continue
        if is_choice:
            choice = setting  # the last one counts
        else:
            others.append(setting)
    if choice is None:
        return others
    if not isinstance(choice.value, str):
        problems.append(f"stage={choice.value}: must be the name of one stage.")
        return others
    if choice.value in config_dir.groups()["stage"] or choice.value not in all_stages():
        return [choice, *others]  # of what is no stage, the check of the choices says so
    values = {"stage.name": choice.value, "stage.parent": None}
    own = [replace(choice, key=key, value=value, is_choice=False) for key, value in values.items()]
    return [replace(choice, value=stage_named(choice.value).config_file), *own, *others]
