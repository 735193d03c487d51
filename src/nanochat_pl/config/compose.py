"""From ``key=value`` texts to a checked settings object: compose, resolve, check everything, build.

Hydra composes the root file of the command with the chosen groups. Single values are laid over it in the order of their
weight (group files < experiment file < command line) and the whole goes through :func:`common.schema.build`, which
knows every key. All problems are raised together.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanochat_pl.common.errors import UserError, did_you_mean, first_line
from nanochat_pl.common.run_dir import check_name
from nanochat_pl.common.schema import build, to_plain
from nanochat_pl.common.yaml_files import read_yaml
from nanochat_pl.config import config_dir
from nanochat_pl.config.overrides import DELETED, Setting, is_group, is_key, parse_overrides, type_of_key
from nanochat_pl.config.stage_choice import with_stage_files
from nanochat_pl.training.stages.registry import all_stages

T = TypeVar("T")


@dataclass(frozen=True)
class Composed(Generic[T]):
    """What a command was composed to.

    Attributes:
        config: the settings object that the command takes.
        overrides: the ``key=value`` texts of the command line, as typed.
        experiment: name of the experiment, empty without one.
        given: dotted keys that a person set: on the command line, in an experiment, or by choosing a group's file.
    """

    config: T
    overrides: tuple[str, ...] = ()
    experiment: str = ""
    given: frozenset[str] = frozenset()

    def plain(self) -> dict[str, Any]:
        """Every setting as plain data, defaults included: what is written to config.yaml."""
        return to_plain(self.config)


def compose(
    root: str,
    schema: type[T],
    overrides: Sequence[str] = (),
    before: Sequence[Setting] = (),
    experiment: str = "",
) -> Composed[T]:
    """Compose and check the configuration of a command.

    Args:
        root: name of the root file in configs/, without ``.yaml``.
        schema: the settings class that the whole must fit.
        overrides: ``key=value`` texts of the command line.
        before: settings of an experiment file, which the command line overrules.
        experiment: its name.

    Raises:
        UserError: with all problems of all of them.
    """
    groups = groups_of(schema)
    problems: list[str] = []
    typed = parse_overrides(overrides, schema, groups, problems)
    settings = with_stage_files([*_not_chosen_anew(before, typed), *typed], problems)
    tree, choices = _hydra_tree(root, _check_choices(settings, groups, problems))
    for setting in settings:
        if not setting.is_choice:
            _lay_over(tree, setting, problems)
    values, unresolved = _resolve(tree)
    found = list(unresolved.values())
    config: T | None = None
    try:
        config = build(schema, values)
    except UserError as error:
        found += [line for line in error.problems if key_of(line) not in unresolved]
    if "callbacks" in groups:
        found += _problems_of_classes(values)
    found += _problems_of_name(values.get("run"))
    problems += [_with_origin(line, settings, choices) for line in found]
    if config is None or problems:
        raise UserError(problems, f"Keys and their meaning: nanochat-pl {root} --help")
    return Composed(config, tuple(overrides), experiment, _given(settings))


def _problems_of_classes(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the classes that the settings of a training name."""
    from nanochat_pl.config import instantiate  # with Lightning, which takes seconds; other commands have no classes

    stage = values.get("stage")
    found = instantiate.problems_of_module(stage.get("module")) if isinstance(stage, Mapping) else []
    return [
        line for group in instantiate.OBJECTS for line in instantiate.problems_of_objects(values.get(group), group)
    ] + found


def _not_chosen_anew(before: Sequence[Setting], typed: Sequence[Setting]) -> list[Setting]:
    """An experiment's settings, but for those of a group whose file the command line chooses: that is another group.

    All but the stage: a command names it to say which section of the experiment is meant.
    """
    chosen = {setting.key for setting in typed if setting.is_choice} - {"stage"}
    return [setting for setting in before if setting.key.split(".")[0] not in chosen]


def _problems_of_name(run: object) -> list[str]:
    """What is wrong with the name of a run: an empty one is a mistake, and not none."""
    if isinstance(run, str):
        try:
            check_name(run)
        except UserError as error:
            return [f"{' '.join(error.problems)} {error.fix}"]
    return []


def _given(settings: Sequence[Setting]) -> frozenset[str]:
    keys = {setting.key for setting in settings if not setting.is_choice and setting.value is not DELETED}
    for setting in settings:
        if setting.is_choice:
            keys |= {
                f"{setting.key}.{key!s}" for name in _names(setting.value) for key in _with_defaults(setting.key, name)
            }
    return frozenset(keys)


def groups_of(schema: type) -> dict[str, list[str]]:
    """The config groups that a command has, with their choices: folders of configs/ whose key is a group of
    settings; and the stages that need no file."""
    found = {name: options for name, options in config_dir.groups().items() if is_group(type_of_key(schema, name))}
    return {**found, "stage": sorted({*found["stage"], *all_stages()})} if "stage" in found else found


def _check_choices(
    settings: Sequence[Setting], groups: Mapping[str, list[str]], problems: list[str]
) -> dict[str, str | list[str]]:
    """The last choice of each group, where its files exist; what does not exist goes to ``problems``."""
    choices: dict[str, str | list[str]] = {}
    for setting in settings:
        if not setting.is_choice:
            continue
        options = groups[setting.key]
        wrong = ["null" if name is None else str(name) for name in _names(setting.value) if name not in options]
        if wrong:
            near = did_you_mean(wrong[0], options)
            listed = "" if near.startswith("valid") else f" There are: {', '.join(options)}."
            where = f" ({setting.origin})" if setting.origin else ""
            problems.append(f"{setting.key}={wrong[0]}: there is no such choice; {near}{listed}{where}")
        else:
            choices[setting.key] = setting.value
            for name in _names(setting.value):
                _group_file(setting.key, name)  # what is wrong with it is found here, with file and line
    return choices


def _hydra_tree(root: str, choices: Mapping[str, str | list[str]]) -> tuple[DictConfig, dict[str, Any]]:
    """The root file with its groups composed, and the files that were taken: group → choice or choices."""
    texts = [
        f"{key}=[{','.join(value)}]" if isinstance(value, list) else f"{key}={value}" for key, value in choices.items()
    ]
    tree, taken = _composed_files(config_dir.root_file(root), tuple(texts), tuple(config_dir.folders()))
    return copy.deepcopy(tree), taken


@functools.lru_cache(maxsize=32)
def _composed_files(root: str, texts: tuple[str, ...], folders: tuple[Path, ...]) -> tuple[DictConfig, dict[str, Any]]:
    """Read once: all jobs of a sweep are made of the same files."""
    try:
        with config_dir.hydra() as hydra:
            tree = hydra.compose_config(root, list(texts), RunMode.RUN, from_shell=False)
    except Exception as error:  # of Hydra, of YAML, of a file that refers to itself
        raise UserError(f"{root}.yaml: cannot be composed: {_first_cause(error)}") from error
    OmegaConf.set_struct(tree, False)
    taken = tree.pop("hydra").runtime.choices
    # A file may take another one of its group for a part of its own: GROUP@PLACE is no choice of a person.
    return tree, {group: choice for group, choice in taken.items() if choice and not re.search("^hydra/|@", group)}


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"


def _lay_over(tree: DictConfig, setting: Setting, problems: list[str]) -> None:
    if setting.value is DELETED:
        *groups, name = setting.key.split(".")
        owner = OmegaConf.select(tree, ".".join(groups)) if groups else tree
        if not isinstance(owner, DictConfig) or name not in owner:
            problems.append(f"~{setting.key}: there is nothing of that name to delete.")
        else:
            del owner[name]
        return
    if not is_key(setting.key):
        problems.append(f"{setting.key}: is no key; keys are names joined by dots, as in model.depth.")
        return
    value = _escaped(setting.value) if setting.is_text else setting.value
    try:
        OmegaConf.update(tree, setting.key, value, merge=True, force_add=True)
    except (OmegaConfBaseException, ValueError) as error:
        problems.append(f"{setting.key}={setting.value}: cannot be set: {first_line(error)}")


def _escaped(value: Any) -> Any:
    """Text that OmegaConf gives back as it is: ``${`` begins an interpolation, a backslash before it escapes it."""
    if not isinstance(value, str):
        return value
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)


def _resolve(tree: DictConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree as plain data with its interpolations resolved, and a problem for each key where that failed."""
    problems: dict[str, str] = {}
    while True:
        try:
            return OmegaConf.to_container(tree, resolve=True), problems  # type: ignore[return-value]
        except RecursionError as error:
            raise UserError("the configuration: an interpolation ${…} is nested too deeply.") from error
        except OmegaConfBaseException as error:
            key = str(error.full_key or "")
            if not key or key in problems:
                raise UserError(f"{key or 'the configuration'}: {first_line(error)}") from error
            problems[key] = f"{key}: {first_line(error)}"
            OmegaConf.update(tree, key, None)


def _with_origin(problem: str, settings: Sequence[Setting], choices: Mapping[str, Any]) -> str:
    """A problem with the place where its key was written, unless that is the command line."""
    key = key_of(problem)
    for setting in reversed(settings):
        if not setting.is_choice and (key == setting.key or _within(setting.key, key) or _within(key, setting.key)):
            return f"{problem} ({setting.origin})" if setting.origin else problem
    for group, choice in choices.items():
        for name in _names(choice):
            content = _group_file(group, name)
            if any(_has(content, each) for each in (key, key.removeprefix(f"{group}."))):
                return f"{problem} ({_shown(config_dir.group_file(group, name))})"
    return problem


def _shown(path: Path) -> str:
    """A file of ours as it is in the repository, another one as it is."""
    folder = config_dir.config_folder()
    return f"configs/{path.relative_to(folder)}" if path.is_relative_to(folder) else str(path)


def key_of(problem: str) -> str:
    """The key that a problem of the settings begins with."""
    return re.split(r"[=:\[ ]", problem, maxsplit=1)[0]


def _names(choice: Any) -> Sequence[Any]:
    """The file names of a choice: of one, or of a list."""
    return choice if isinstance(choice, (list, ListConfig)) else [choice]


@functools.lru_cache(maxsize=256)
def _read_group_file(path: Path) -> Mapping[str, Any]:
    content = read_yaml(path)
    if not isinstance(content or {}, dict) or any(not isinstance(key, str) for key in content or {}):
        raise UserError(f"{path}: must be a group of settings, each with its name.")
    return content or {}


def _group_file(group: str, name: str) -> Mapping[str, Any]:
    return _read_group_file(config_dir.group_file(group, name))


def _with_defaults(group: str, name: str, within: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The keys at the top of a group's file, with those of files of this group that its `defaults` name."""
    content = {**_group_file(group, name)}
    found: dict[str, Any] = {}
    within |= {name}  # files that name each other are Hydra's to refuse
    beside = {*config_dir.groups().get(group, ())} - within
    for other in content.pop("defaults", None) or ():
        if isinstance(other, str) and other in beside:
            found |= _with_defaults(group, other, within)
    return found | content


def stage_of_file(name: str) -> str:
    """The stage that a file of the group `stage` is of, which may have another name; of none the name itself."""
    if name not in config_dir.groups()["stage"]:
        return name
    stage = _with_defaults("stage", name).get("stage")
    return str(stage.get("name", name)) if isinstance(stage, Mapping) else name


def _has(content: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(content, Mapping) or part not in content:
            return False
        content = content[part]
    return True


def _within(key: str, outer: str) -> bool:
    return key.startswith(f"{outer}.")
