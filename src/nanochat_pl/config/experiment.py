"""Experiment files: one YAML that holds every number of a certain run, for all of its stages.

::

    description: one line
    pipeline: [tokenizer, base, mid, sft, evaluate, report]
    shared: {…}                       keys of every step that has them
    stages: {base: {…}, sft: {…}}     keys of one step
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.common.schema import build, setting
from nanochat_pl.common.yaml_files import read_yaml
from nanochat_pl.config import config_dir
from nanochat_pl.config.compose import Composed, compose, groups_of
from nanochat_pl.config.overrides import UNKNOWN, Setting, section_settings, take_key, type_of_key
from nanochat_pl.config.stage_choice import name_of_stage
from nanochat_pl.training.stages.registry import all_stages

T = TypeVar("T")

# What a pipeline is made of: the training stages, and commands that read what these leave.
MAX_STEPS = 50
COMMANDS = ("evaluate", "report")


@dataclass(frozen=True)
class Experiment:
    """An experiment file as it was read."""

    pipeline: list[str] = setting(factory=list, doc="Steps of the pipeline, in their order.")
    description: str = setting("", "What it is for.")
    shared: dict[str, Any] = setting(factory=dict, doc="Keys of every step that has them.")
    stages: dict[str, Any] = setting(factory=dict, doc="Keys of one step, by its name.")

    def __post_init__(self) -> None:
        if len(self.pipeline) > MAX_STEPS:
            raise UserError(f"pipeline: has {len(self.pipeline):,} steps; at most {MAX_STEPS}.")
        names = [name_of_stage(step) for step in self.pipeline]
        known = (*all_stages(), *COMMANDS)
        unknown = [f"pipeline: {step!r} is no step; {did_you_mean(step, known)}" for step in names if step not in known]
        unknown += [
            f"stages.{step}: is no step; {did_you_mean(step, known)}" for step in self.stages if step not in known
        ]
        unknown += [
            f"stages.{step}: must be a group of settings."
            for step, section in self.stages.items()
            if not isinstance(section, Mapping)
        ]
        if unknown:
            raise UserError(unknown)


def read_experiment(name: str) -> tuple[Experiment, Path]:
    """Read an experiment by its name or path. Raises :class:`UserError` that names the file and the key."""
    path = config_dir.experiment_file(name)
    try:
        return build(Experiment, read_yaml(path) or {}), path
    except UserError as error:
        named = [problem if problem.startswith(str(path)) else f"{path}: {problem}" for problem in error.problems]
        raise UserError(named, error.fix) from error


def settings_of_step(experiment: Experiment, path: Path, step: str, schema: type) -> list[Setting]:
    """The settings that an experiment gives to one of its steps: the shared ones, then the step's own.

    A training stage takes all shared keys, so that a typo among them is found. The other commands take those they have.
    """
    groups = groups_of(schema)
    shared: Mapping[str, Any] = experiment.shared
    if step in COMMANDS:
        shared = {key: value for key, value in shared.items() if type_of_key(schema, key.split(".")[0]) is not UNKNOWN}
    return [
        *section_settings(shared, schema, groups, f"{path}, shared"),
        *section_settings(experiment.stages.get(step, {}), schema, groups, f"{path}, stages.{step}"),
    ]


def compose_step(
    command: str, step: str, schema: type[T], overrides: Sequence[str], own: Sequence[Setting] = ()
) -> Composed[T]:
    """Compose a command whose command line may name an experiment.

    Group files, then what a stage has of its ``own``, the experiment's sections, the command line.
    """
    name, rest = take_key(overrides, "experiment")
    if not name:
        if len(rest) < len(overrides):  # an empty variable of the shell is a mistake, and not none
            known = ", ".join(config_dir.experiments())
            raise UserError("experiment=: names none.", f"Name one ({known}, or a file's path), or leave the key out.")
        return compose(command, schema, rest, own)
    experiment, path = read_experiment(name)
    before = [*own]
    before += [Setting("stage", step, is_choice=True)] if "stage" in groups_of(schema) else []
    before += settings_of_step(experiment, path, name_of_stage(step), schema)
    return compose(command, schema, rest, before, experiment=path.stem)
