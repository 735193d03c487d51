"""What is set, by whom: ``key=value`` texts and sections of experiment files, as keys with plain values.

Values are read with Hydra's grammar, with one exception: a key whose type is text takes what follows the first ``=``
exactly as it was typed, quotes, commas, braces, ``$`` and all. Problems are collected, never raised one at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from nanochat_pl.common.errors import first_line

# Anything a person types is a prompt, the word null too.
NEVER_NULL = ("prompt",)
UNKNOWN = object()
DELETED = object()


@dataclass(frozen=True)
class Setting:
    """One key that was set.

    Attributes:
        key: dotted name, ``model.depth``; a group's name where a choice was made, ``data``.
        value: plain data; for a choice the option's name or a list of them; :data:`DELETED` for ``~key``.
        is_choice: whether it chooses a file of a config group.
        is_text: whether the value is to be taken as it is, without interpolation.
        origin: where it was written, for messages; empty for the command line.
    """

    key: str
    value: Any
    is_choice: bool = False
    is_text: bool = False
    origin: str = ""


def parse_overrides(
    texts: Sequence[str], schema: type, groups: Mapping[str, list[str]], problems: list[str]
) -> list[Setting]:
    """Read ``key=value`` texts. What cannot be read is said in ``problems``; the rest is returned, in order."""
    settings = []
    problems += problems_of_form(texts, schema)
    for text in texts:
        key, raw, problem = split_override(text)
        if problem:
            continue
        if key.startswith("~"):
            settings.append(_deletion(key[1:], schema, groups))
            continue
        hint = type_of_key(schema, key)
        if hint is UNKNOWN:  # said by the check of the whole, with the nearest names
            settings.append(Setting(key, raw, is_text=True))
        elif is_text(hint):
            value = None if raw == "null" and type(None) in get_args(hint) and key not in NEVER_NULL else raw
            settings.append(Setting(key, value, is_text=True))
        elif (parsed := _parse(key, raw, problems)) is not None:
            if parsed.is_sweep_override():
                problems.append(f"{text}: several values for one key need -m, which runs one job for each.")
                continue
            flat = _flat({key: _plain(parsed.value())}, schema, "")
            settings += [_setting(name, value, schema, groups) for name, value in flat]
    return settings


def section_settings(
    section: Mapping[str, Any], schema: type, groups: Mapping[str, list[str]], origin: str
) -> list[Setting]:
    """Turn a section of an experiment file into settings: a text for a group is a choice, nested names are joined."""
    return [_setting(key, value, schema, groups, origin) for key, value in _flat(section, schema, "")]


def split_override(text: str) -> tuple[str, str, str]:
    """Part ``key=value`` at the first ``=``; gives key, raw value and, where it is no such thing, the problem.

    ``+key=value`` and ``++key=value`` are Hydra's ways to add a key. Every key is known here, so they say the same.
    ``~key`` deletes one; its key is given with the sign.
    """
    key, equals, raw = text.partition("=")
    key = key.lstrip("+")
    if key.startswith("-"):
        return key, raw, f"{text}: options are written key=value, without dashes (those of Hydra: --hydra-help)."
    if key.startswith("~") and equals:
        return key, raw, f"{text}: write ~{key[1:]}, without a value."
    if not equals and not key.startswith("~"):
        return key, raw, f"{text}: is not of the form key=value."
    if not is_key(key.removeprefix("~")):
        return key, raw, f"{text}: {key!r} is no key; keys are names joined by dots, as in model.depth=4."
    return key, raw, ""


def is_key(key: str) -> bool:
    """Whether a text has the form of a key: names joined by dots, or by the strokes of Hydra's groups."""
    return all(part.replace("_", "").replace("-", "").isalnum() for part in re.split(r"[./]", key))


def is_hydra_key(text: str) -> bool:
    """Whether an override, or its key, is one of Hydra itself: ``hydra.run.dir=x``, ``+hydra/launcher``."""
    return text.lstrip("+~").startswith(("hydra.", "hydra/"))


def problems_of_form(texts: Sequence[str], *schemas: type) -> list[str]:
    """What is no ``key=value`` among the texts. Words behind a key that takes text are most likely the rest of it."""
    problems: dict[str, None] = {}
    text_key, first_word = "", ""
    for text in texts:
        key, _, problem = split_override(text)
        if not problem:
            if any(is_text(type_of_key(schema, key)) for schema in schemas):
                text_key, first_word = key, ""
        elif text_key and "=" not in text and not text.startswith(("~", "-")):
            first_word = first_word or text
            problems[f'{first_word}: put quotes around text with blanks: {text_key}="…"'] = None
        else:
            problems[problem] = None
    return list(problems)


def take_key(texts: Sequence[str], key: str) -> tuple[str, list[str]]:
    """The last value of a key that has to be known before all others (empty: not given), and the texts without it."""
    values, rest = [], []
    for text in texts:
        found, raw, problem = split_override(text)
        if found == key and not problem:
            values.append(raw)
        else:
            rest.append(text)
    return (values[-1] if values else ""), rest


_type_hints = functools.cache(get_type_hints)


def type_of_key(schema: type, key: str) -> Any:
    """The declared type of a dotted key, :data:`UNKNOWN` where the settings classes have no such key."""
    hint: Any = schema
    for part in key.split("."):
        hint = without_none(hint)
        if dataclasses.is_dataclass(hint):
            hint = _type_hints(hint).get(part, UNKNOWN)  # type: ignore[arg-type]
        elif get_origin(hint) is dict:
            hint = get_args(hint)[1]
        elif hint is not Any:
            return UNKNOWN
    return hint


def is_text(hint: Any) -> bool:
    """Whether a key of this type takes any text: ``str`` or ``str | None``."""
    return without_none(hint) is str


def is_object_group(hint: Any) -> bool:
    """Whether it is a group of objects with names of the user's: loggers, callbacks."""
    return get_origin(without_none(hint)) is dict


def is_group(hint: Any) -> bool:
    """Whether a key of this type has keys of its own."""
    return dataclasses.is_dataclass(without_none(hint)) or is_object_group(hint)


def without_none(hint: Any) -> Any:
    """The type of a key that may be null, when it is not."""
    if get_origin(hint) in (Union, types.UnionType):
        others = [choice for choice in get_args(hint) if choice is not type(None)]
        return others[0] if len(others) == 1 else hint
    return hint


def _deletion(key: str, schema: type, groups: Mapping[str, list[str]]) -> Setting:
    """``~key``: the default of its class; of a group of objects, as ``~logger``, none of them."""
    if key in groups and is_object_group(type_of_key(schema, key)):
        return Setting(key, [], is_choice=True)
    return Setting(key, DELETED)


def _parse(key: str, raw: str, problems: list[str]) -> Override | None:
    try:
        return OverridesParser.create().parse_override(f"{key}={raw}")
    except HydraException as error:
        problems.append(
            f"{key}={raw}: the value cannot be read ({first_line(error)}); put quotes around text with special signs."
        )
        return None


def _plain(value: Any) -> Any:
    """Hydra's parsed values (quoted strings, …) as plain data."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _setting(key: str, value: Any, schema: type, groups: Mapping[str, list[str]], origin: str = "") -> Setting:
    if key in groups and value is None and is_object_group(type_of_key(schema, key)):
        value = []  # logger=null: none of its files
    return Setting(key, value, is_choice=key in groups and not isinstance(value, Mapping), origin=origin)


def _flat(section: Mapping[str, Any], schema: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        key = f"{prefix}{name}"
        hint = type_of_key(schema, key)
        if isinstance(value, Mapping) and value and (is_group(hint) or hint is UNKNOWN):
            yield from _flat(value, schema, f"{key}.")
        else:
            yield key, value
