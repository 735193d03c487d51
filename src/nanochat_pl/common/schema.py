"""Plain data into dataclasses, with types and bounds checked and every problem collected.

Two readers use it: the configuration (composed YAML → settings) and everything read from a bundle (JSON → settings).
So a wrong key, a wrong type or a number out of bounds is found in one place, by one rule, before anything is built.

A settings class is a frozen dataclass whose fields are made with :func:`setting`::

    @dataclass(frozen=True)
    class ModelSettings:
        depth: int = setting(12, "Number of transformer blocks: the one dial.", at_least=1, at_most=200)

A class may have a static method ``explain_unknown(key, value) -> str | None``: of some keys that the class has not, it
knows more than which others have a name like theirs, and gives what is said behind the key's name.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.common.user_path import user_path

T = TypeVar("T")
_type_hints = functools.cache(get_type_hints)  # a list of thousands of files is built with one class
_BOUNDS = {
    "at_least": (lambda value, bound: value >= bound, "below"),
    "at_most": (lambda value, bound: value <= bound, "above"),
    "above": (lambda value, bound: value > bound, "not above"),
}


def setting(
    default: Any = dataclasses.MISSING,
    doc: str = "",
    *,
    factory: Any = dataclasses.MISSING,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    max_length: int | None = None,
    path: Literal["place", "pattern"] | None = None,
) -> Any:
    """A dataclass field with its meaning and its bounds.

    Args:
        default: the value when none is given; without one (and without ``factory``) the field is required.
        doc: what it means, with its unit: shown by ``--help`` and in the docs.
        factory: makes the default of a mutable field.
        at_least, at_most, above: bounds of a number, or of each number in a sequence.
        max_length: bound of a sequence's or a text's length.
        path: the text is a path of the user's, checked by :func:`~nanochat_pl.common.user_path.user_path`. A place is
            a file or folder, and its ``~`` is expanded. A pattern may be a glob, and is kept as it was typed: what a
            run was begun with is compared with it, and a home folder may be another one by then.
    """
    limits = {"at_least": at_least, "at_most": at_most, "above": above, "max_length": max_length, "path": path}
    metadata = {"doc": doc, **{name: value for name, value in limits.items() if value is not None}}
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Make a settings dataclass of plain data.

    Args:
        cls: a dataclass; fields may be nested dataclasses, numbers, text, Literal, Optional, list, tuple, dict.
        values: plain data (what JSON or resolved YAML gives).
        where: prefix of the names in messages, e.g. ``"model"`` or a file's path.

    Raises:
        UserError: with *all* problems found: unknown keys (and the nearest valid ones), missing keys, wrong types,
            values out of bounds, and what the class's own ``__post_init__`` refuses.
    """
    problems: list[str] = []
    result = _build(cls, values, where, problems)
    if problems:
        raise UserError(problems)
    return result


def build_known(cls: type[T], row: Any, where: str) -> T:
    """As :func:`build`, of the keys that the class has: files of later versions may say more."""
    if isinstance(row, Mapping):
        row = {item.name: row[item.name] for item in dataclasses.fields(cls) if item.name in row}  # type: ignore[arg-type]
    return build(cls, row, where)


def is_finite_number(value: Any) -> bool:
    """Whether a plain value is a number that counts something: no truth value, no NaN, not infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def validation_errors(cls: type, values: Mapping[str, Any], where: str = "") -> list[str]:
    """All problems that :func:`build` would raise, as lines; empty where there are none."""
    problems: list[str] = []
    _build(cls, values, where, problems)
    return problems


def to_plain(value: Any) -> Any:
    """The inverse of :func:`build`: dataclasses into plain dicts, tuples into lists. Fit for JSON and for YAML."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _nearest(where: str, name: str, cls: Any, valid: Iterable[str]) -> str:
    """The nearest names as a person types them, with their group. A ``where`` that is a file is left out."""
    if name in (nested := _nested_names(cls)):  # depth=4 for model.depth=4
        return f"did you mean {_join(where, nested[name])}?"
    hint = did_you_mean(name, valid)
    if hint.startswith("did you mean ") and where and all(part.isidentifier() for part in where.split(".")):
        hint = hint.replace(" mean ", f" mean {where}.").replace(" or ", f" or {where}.")
    return hint


def _nested_names(cls: Any) -> dict[str, str]:
    """The keys of the groups of a group, by their own names; the first where several groups have one of that name."""
    found: dict[str, str] = {}
    for group, hint in _type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            for field in dataclasses.fields(hint):
                found.setdefault(field.name, f"{group}.{field.name}")
    return found


def _build(cls: Any, values: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(values, Mapping):
        problems.append(f"{where}{'=' * bool(where)}{values!r}: must be a group of settings ({cls.__name__}).")
        return None
    hints = _type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    found = len(problems)
    for key in values:
        if key not in fields:
            name, explain = _join(where, str(key) or "''"), getattr(cls, "explain_unknown", lambda key, value: None)
            nearest = f": there is no such key; {_nearest(where, str(key), cls, fields)}"
            problems.append(f"{name}{explain(str(key), values[key]) or nearest}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], _join(where, name), field.metadata, problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{_join(where, name)}: is missing.")
    if len(problems) > found:
        return None
    try:
        return cls(**arguments)
    except UserError as error:
        problems.extend(_join(where, line) if where else line for line in error.problems)
        return None


def _convert(hint: Any, value: Any, where: str, limits: Mapping[str, Any], problems: list[str]) -> Any:
    if hint is Any:
        _check_plain(value, where, problems)
        return value
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where, limits, problems)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            choices = ", ".join(str(choice) for choice in arguments)
            problems.append(f"{where}={value!r}: must be one of {choices}.")
        return value
    if origin in (list, tuple):
        return _convert_sequence(origin, arguments, value, where, limits, problems)
    if origin is dict:
        if not isinstance(value, Mapping):
            problems.append(f"{where}={value!r}: must be a group of named values.")
            return value
        if no_texts := [key for key in value if not isinstance(key, str)]:
            problems.append(f"{where}: the key {no_texts[0]!r} is no text; put quotes around it.")
            return value
        return {key: _convert(arguments[1], item, _join(where, key), limits, problems) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where, problems)
    return _convert_scalar(hint, value, where, limits, problems)


def _check_plain(value: Any, where: str, problems: list[str]) -> None:
    """Of data that may be anything, find the numbers that no JSON could keep."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(item, _join(where, str(key)), problems)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]", problems)
    elif isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{where}={value!r}: must be a finite number.")


def _convert_union(
    choices: tuple[Any, ...], value: Any, where: str, limits: Mapping[str, Any], problems: list[str]
) -> Any:
    if value is None and type(None) in choices:
        return None
    others = [choice for choice in choices if choice is not type(None)]
    attempts = []
    for choice in others:
        attempt: list[str] = []
        result = _convert(choice, value, where, limits, attempt)
        if not attempt:
            return result
        attempts.append(attempt)
    of_right_type = [attempt for attempt in attempts if " must be " not in attempt[0]]  # but out of bounds
    if len(others) == 1 or of_right_type:
        problems.extend([*of_right_type, *attempts][0])
    else:
        problems.append(f"{where}={value!r}: must be {' or '.join(_describe(choice) for choice in choices)}.")
    return value


def _convert_sequence(
    origin: Any, arguments: tuple[Any, ...], value: Any, where: str, limits: Mapping[str, Any], problems: list[str]
) -> Any:
    if not isinstance(value, (list, tuple)):
        problems.append(f"{where}={value!r}: must be a list.")
        return value
    if "max_length" in limits and len(value) > limits["max_length"]:
        problems.append(f"{where}: has {len(value):,} entries, above {limits['max_length']:,}.")
        return value
    item_limits = {name: bound for name, bound in limits.items() if name != "max_length"}
    hint = arguments[0] if arguments else Any
    return origin(_convert(hint, item, f"{where}[{i}]", item_limits, problems) for i, item in enumerate(value))


def _convert_scalar(hint: Any, value: Any, where: str, limits: Mapping[str, Any], problems: list[str]) -> Any:
    fits = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value),
        str: isinstance(value, str),
    }.get(hint)
    if fits is None:
        raise TypeError(f"{where}: settings of type {hint!r} are not supported")
    if not fits:
        whole = hint is int and isinstance(value, float) and value.is_integer() and abs(value) < 1e18
        problems.append(f"{where}={value!r}: must be {_describe(hint)}{f'; write {value:.0f}' if whole else ''}.")
        return value
    if hint is float:
        value = float(value)
    if hint is str and len(value) > limits.get("max_length", len(value)):
        problems.append(f"{where}: has {len(value):,} characters, above {limits['max_length']:,}.")
    if hint is str and "path" in limits:
        try:
            expanded = user_path(where, value)
            return expanded if limits["path"] == "place" else value
        except UserError as error:
            problems.append(f"{' '.join(error.problems)} {error.fix}")
    if hint in (int, float):
        for name, (holds, word) in _BOUNDS.items():
            if name in limits and not holds(value, limits[name]):
                problems.append(f"{where}={value!r}: is {word} {limits[name]:,}.")
    return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _describe(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(hint, getattr(hint, "__name__", str(typing.cast(Any, hint))))
