"""`nanochat-pl COMMAND --help`: the keys of a command with their meaning, straight from the settings classes."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from nanochat_pl.cli.main import module_of
from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.config import config_dir
from nanochat_pl.config.compose import Composed
from nanochat_pl.config.experiment import compose_step
from nanochat_pl.config.hydra_app import HydraOptions
from nanochat_pl.config.overrides import UNKNOWN, is_group, take_key, type_of_key, without_none

TAKE_WORDS = ("compare", "scaling")  # names of runs, and conditions on them
_BOUNDS = {"gt": "above", "ge": "at least", "le": "at most"}


def print_help(command: str, wanted: Sequence[str] = ()) -> None:
    """Print the keys of a command: those that matter, or all of the groups that are named in ``wanted``."""
    module = importlib.import_module(module_of(command))
    schema = module.Config
    if wanted:
        for name in wanted:
            _print_group(schema, name)
        return
    print(f"{inspect.getdoc(module)}\n\nKeys:")
    hints = get_type_hints(schema)
    plain = [field.name for field in dataclasses.fields(schema) if not is_group(hints[field.name])]
    nested = [key for key in getattr(module, "HELP_KEYS", ()) if type_of_key(schema, key) is not UNKNOWN]
    extra = getattr(module, "EXTRA_KEYS", {})
    lines = [(key, "", doc) for key, doc in extra.items()] + [_describe(schema, key) for key in [*nested, *plain]]
    _print_lines(lines)
    _print_groups(command, schema)


def print_config(command: str, options: HydraOptions) -> None:
    """Print every value that a command would use, defaults and experiment included, as YAML: ``--cfg job`` of Hydra.

    Interpolations are always resolved. ``--package optim`` prints one group.

    Raises:
        UserError: something is wrong with the settings, or there is no such configuration or group.
    """
    if command == "pipeline":
        fix = "Print that of a stage: nanochat-pl train stage=sft … --cfg job"
        raise UserError("--cfg job: a pipeline has a configuration for each of its steps.", fix)
    values: Any = compose_command(command, options.own_overrides).plain()
    for part in (options.package or "_global_").removeprefix("_global_").split("."):
        if part:
            if not isinstance(values, dict) or part not in values:
                raise UserError(f"--package {options.package}: the configuration has no such group.")
            values = values[part]
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")


def compose_command(command: str, overrides: Sequence[str]) -> Composed[Any]:
    """Compose and check the settings of a command as it does itself; of ``pipeline`` each step has its own."""
    step = take_key(overrides, "stage")[0] or "base" if command in config_dir.LIKE_TRAIN else command
    module = importlib.import_module(module_of(command))
    if command in TAKE_WORDS:
        from nanochat_pl.cli._choose_runs import overrides_of

        overrides = overrides_of(overrides, module.Config)
    return compose_step(command, step, module.Config, overrides)


def check_command(command: str, overrides: Sequence[str]) -> None:
    """Compose and check the settings of a command, of a pipeline those of all steps. Raises :class:`UserError`."""
    if command == "pipeline":
        from nanochat_pl.cli.pipeline import check_all, steps_of

        check_all(steps_of(overrides))
    else:
        compose_command(command, overrides)


def _print_groups(command: str, schema: type) -> None:
    hints, options = get_type_hints(schema), config_dir.groups()
    names = [field.name for field in dataclasses.fields(schema) if is_group(hints[field.name])]
    if not names:
        return
    print("\nGroups (GROUP=CHOICE takes a file, GROUP.KEY=VALUE sets one key):")
    _print_lines([(name, "", f"choices: {', '.join(options[name])}" if options.get(name) else "") for name in names])
    print(f"\nAll keys of a group: nanochat-pl {command} --help {names[0]}")
    print(f"Files: {config_dir.config_folder()}; experiments: {', '.join(config_dir.experiments()) or 'none'}")


def _print_group(schema: type, name: str) -> None:
    hint = without_none(type_of_key(schema, name))
    if get_origin(hint) is dict and dataclasses.is_dataclass(without_none(get_args(hint)[1])):
        name, hint = f"{name}.NAME", without_none(get_args(hint)[1])
    if hint is UNKNOWN:
        names = [field.name for field in dataclasses.fields(schema)]
        raise UserError(f"--help {name}: there is no such group or key; {did_you_mean(name, names)}")
    if not dataclasses.is_dataclass(hint):
        _print_lines([_describe(schema, name)])
        return
    choices = config_dir.groups().get(name, [])
    print(
        f"{name}: {(inspect.getdoc(hint) or '').replace('`', '')}"
        + (f"\nchoices: {', '.join(choices)}" if choices else "")
    )
    _print_lines([_describe(schema, f"{name}.{field.name}") for field in dataclasses.fields(hint)])


@dataclass(frozen=True)
class KeyDescription:
    """What the settings classes say of a key.

    Attributes:
        key: its dotted name.
        type: for people: ``whole number``, ``true | false``, the choices.
        default: as it would be typed; None: it has none, or is a group.
        bounds: of a number: ``at least 1, at most 200``; empty where there are none.
        meaning: in words, with its unit.
    """

    key: str
    type: str
    default: str | None
    bounds: str
    meaning: str


def describe_key(schema: type, key: str) -> KeyDescription:
    """A key of a command's settings class, by its dotted name; ``NAME`` stands for a name of one's own."""
    *groups, name = key.split(".")
    owner: Any = without_none(type_of_key(schema, ".".join(groups))) if groups else schema
    field = next(field for field in dataclasses.fields(owner) if field.name == name)
    hint, default = get_type_hints(owner)[name], _default(schema, key)
    has_default = default is not UNKNOWN and not dataclasses.is_dataclass(hint)
    bounds = [f"{words} {field.metadata[bound]:,}" for bound, words in _BOUNDS.items() if bound in field.metadata]
    shown = _show(default) if has_default else None
    return KeyDescription(key, _type_name(hint), shown, ", ".join(bounds), field.metadata.get("description", ""))


def _describe(schema: type, key: str) -> tuple[str, str, str]:
    """A key as (key=default, type, meaning)."""
    found = describe_key(schema, key)
    return f"{key}{'' if found.default is None else f'={found.default}'}", found.type, found.meaning


def _default(schema: Any, key: str) -> Any:
    """The value of a key where nothing is set: of the group that its owner makes by itself, as far as it makes one."""
    first, _, rest = key.partition(".")
    fields = {field.name: field for field in dataclasses.fields(schema)}
    if first not in fields:  # a name of one's own in a group of such
        return UNKNOWN
    if isinstance(schema, type):
        value = _own_default(fields[first])
        hint: Any = without_none(get_type_hints(schema)[first])
    else:
        value, hint = getattr(schema, first), without_none(get_type_hints(type(schema))[first])
    if not rest:
        return value
    if get_origin(hint) is dict:
        _, _, rest = rest.partition(".")
        value, hint = None, without_none(get_args(hint)[1])
    return _default(value if dataclasses.is_dataclass(value) else hint, rest)


def _own_default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return UNKNOWN if field.default is dataclasses.MISSING else field.default


def _print_lines(lines: Sequence[tuple[str, str, str]]) -> None:
    width = min(44, max((len(left) for left, _, _ in lines), default=0))
    for left, kind, meaning in lines:
        print(f"  {left:<{width}}  {meaning}{f' ({kind})' if kind else ''}".rstrip())


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):  # a dict of these would find True for 1
        return "null" if value is None else str(value).lower()
    if dataclasses.is_dataclass(value) or isinstance(value, dict):
        changed = value if isinstance(value, dict) else _changed(value)
        return f"{{{', '.join(f'{key}: {_show(item)}' for key, item in changed.items())}}}"
    return f"[{','.join(map(_show, value))}]" if isinstance(value, (list, tuple)) else str(value)


def _changed(group: Any) -> dict[str, Any]:
    """What a group sets otherwise than its class: a task with nothing of it is chosen as ``{}``."""
    values = {field.name: (getattr(group, field.name), _own_default(field)) for field in dataclasses.fields(group)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(filter(None, map(_type_name, get_args(hint))))
    if dataclasses.is_dataclass(hint):
        return "a group of keys"
    if get_origin(hint) in (list, tuple):
        return "list"
    return {int: "whole number", float: "number", str: "text", bool: "true | false", type(None): "null"}.get(hint, "")
