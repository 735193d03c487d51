"""Experiment files: one YAML with every number of a certain run, for all of its stages.

An overlay as in other Hydra projects, and sections for what only one stage needs::

    # @package _global_
    defaults:
      - override /data: python_docs       files of the config groups
      - tiny                              all of another experiment
      - _self_
    description: one line
    pipeline: [tokenizer, base, mid, sft, evaluate, report]
    total_batch_tokens: 4096              keys of every step that has them
    stages: {base: {…}, sft: {…}}         keys of one step, by its name; a text for a group chooses its file
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.common.schema import build, setting
from nanochat_pl.common.yaml_files import read_yaml
from nanochat_pl.config import config_dir
from nanochat_pl.config.compose import Composed, compose, groups_of, stage_of_file
from nanochat_pl.config.overrides import UNKNOWN, Setting, section_settings, take_key, type_of_key
from nanochat_pl.config.stage_choice import name_of_stage
from nanochat_pl.training.stages.registry import all_stages

T = TypeVar("T")

# What a pipeline is made of: the training stages, and commands that read what these leave.
MAX_STEPS = 50
COMMANDS = ("evaluate", "report")
MAX_FILES = 50
_SELF = "_self_"
_OWN_KEYS = ("defaults", "pipeline", "description", "stages", "shared")


@dataclass(frozen=True)
class Experiment:
    """An experiment file as it was read. Every key that is none of these is a setting of all steps that have it."""

    defaults: list[Any] = setting(factory=list, doc="Files of config groups, and other experiments that this one has.")
    pipeline: list[str] = setting(factory=list, doc="Steps of the pipeline, in their order.")
    description: str = setting("", "What it is for.")
    settings: dict[str, Any] = setting(factory=dict, doc="Keys of every step that has them.")
    stages: dict[str, Any] = setting(factory=dict, doc="Keys of one step, by its name.")
    shared: dict[str, Any] = setting(factory=dict, doc="Where older files have the keys of every step.")

    def __post_init__(self) -> None:
        if len(self.pipeline) > MAX_STEPS:
            raise UserError(f"pipeline: has {len(self.pipeline):,} steps; at most {MAX_STEPS}.")
        if twice := sorted({step for step in self.pipeline if self.pipeline.count(step) > 1}):
            raise UserError(f"pipeline: {', '.join(twice)}: more than once.")
        if "stage" in self.choices or isinstance(self.settings.get("stage"), str):
            raise UserError("stage: is named on the command line; what is for one stage stands under stages.")
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
        unknown += [
            f"defaults: {entry!r} is not understood; write - override /GROUP: CHOICE, or the name of an experiment."
            for entry in self.defaults
            if not isinstance(entry, str) and _choice(entry) is None
        ]
        if _SELF in self.defaults[:-1]:
            unknown.append(f"defaults: {_SELF} is not the last entry: what a file says itself comes after what it has.")
        if unknown:
            raise UserError(unknown)

    @property
    def choices(self) -> dict[str, Any]:
        """The files of config groups: group → choice or choices."""
        return dict(choice for entry in self.defaults if (choice := _choice(entry)) is not None)

    @property
    def included(self) -> list[str]:
        """Names of the experiments that this one has all of."""
        names = [entry for entry in self.defaults if isinstance(entry, str) and entry != _SELF]
        return [name if name.endswith((".yaml", ".yml")) else re.sub("^/?experiment/", "", name) for name in names]


def read_experiment(name: str) -> tuple[Experiment, Path]:
    """Read an experiment by its name or path. Raises :class:`UserError` that names the file and the key."""
    path = config_dir.experiment_file(name)
    try:
        content = read_yaml(path)
        content = {} if content is None else content
        if isinstance(content, Mapping):
            own = {key: content[key] for key in _OWN_KEYS if key in content}
            content = {**own, "settings": {key: value for key, value in content.items() if key not in own}}
        return build(Experiment, content), path
    except UserError as error:
        named = [problem if problem.startswith(str(path)) else f"{path}: {problem}" for problem in error.problems]
        raise UserError(named, error.fix) from error


def pipeline_of(name: str) -> list[str]:
    """The steps of an experiment: its own, or those of the last one that it has all of."""
    layers = _layers(name)
    return next((experiment.pipeline for experiment, _ in reversed(layers) if experiment.pipeline), [])


def overlay_of(name: str) -> dict[str, Any]:
    """An experiment with all that it includes, as one file for Hydra itself."""
    choices: dict[str, Any] = {}
    settings = OmegaConf.create()
    for experiment, _ in _layers(name):
        choices |= experiment.choices
        parts = (experiment.shared, experiment.settings, {"stages": experiment.stages} if experiment.stages else {})
        for part in parts:
            for key, value in part.items():
                OmegaConf.update(settings, key, value, force_add=True)
    values = OmegaConf.to_container(settings)
    assert isinstance(values, dict)
    return {"defaults": [*({f"override /{group}": choices[group]} for group in choices), _SELF], **values}


def settings_of_step(name: str, step: str, schema: type) -> list[Setting]:
    """The settings that an experiment gives to one of its steps: those of all steps, then the step's own.

    A training stage takes all keys, so that a typo among them is found. The other commands take those they have.
    """
    groups = groups_of(schema)
    found: list[Setting] = []
    for experiment, path in _layers(name):
        layers = ((experiment.choices, ""), (experiment.shared, ", shared"), (experiment.settings, ""))
        for keys, part in layers:
            if step in COMMANDS:
                keys = {key: value for key, value in keys.items() if _has(schema, key)}
            found += section_settings(keys, schema, groups, f"{path}{part}")
        found += section_settings(experiment.stages.get(step, {}), schema, groups, f"{path}, stages.{step}")
    return found


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
    before = [*own]
    before += [Setting("stage", step, is_choice=True)] if "stage" in groups_of(schema) else []
    before += settings_of_step(name, stage_of_file(name_of_stage(step)), schema)
    return compose(command, schema, rest, before, experiment=config_dir.experiment_file(name).stem)


def _layers(name: str) -> list[tuple[Experiment, Path]]:
    """An experiment with those that it has all of, these first; each once."""
    found: dict[Path, Experiment] = {}
    begun: list[Path] = []

    def read(name: str) -> None:
        experiment, path = read_experiment(name)
        if path in found:
            return
        if path in begun:
            way = " → ".join(each.stem for each in (*begun[begun.index(path) :], path))
            raise UserError(f"{path}: has all of itself: {way}.")
        if len(begun) >= MAX_FILES:
            raise UserError(f"{begun[0]}: has all of more than {MAX_FILES} files.")
        begun.append(path)
        for other in experiment.included:
            beside = other.endswith((".yaml", ".yml")) and not Path(other).is_absolute()
            try:
                read(str(path.parent / other) if beside else other)
            except UserError as error:
                named = [line if ", defaults: " in line else f"{path}, defaults: {line}" for line in error.problems]
                raise UserError(named, error.fix) from error
        begun.remove(path)
        found[path] = experiment

    read(name)
    return [(experiment, path) for path, experiment in found.items()]


def _choice(entry: Any) -> tuple[str, Any] | None:
    """``override /data: local`` as (data, local)."""
    if not isinstance(entry, Mapping) or len(entry) != 1:
        return None
    (key, choice), *_ = entry.items()
    match = re.fullmatch(r"(?:override +)?/?(\w+)", str(key))
    return (match[1], choice) if match else None


def _has(schema: type, key: str) -> bool:
    return type_of_key(schema, key.split(".")[0]) is not UNKNOWN
