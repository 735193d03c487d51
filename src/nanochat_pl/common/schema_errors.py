"""What pydantic finds wrong with settings, as lines that name the key as it is typed, its value and what to write."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nanochat_pl.common.errors import did_you_mean

REFUSED = "refused"  # type of an error that our code has put into words: "lines" of its context
MEMBER = "\0"  # begins the names of a union's members, which pydantic puts among the keys
# By the types of pydantic's errors. ``at`` is the key with its value.
_LINES = {
    "bool_type": "{at}: must be true or false.",
    "dataclass_type": "{at}: must be a group of settings ({class_name}).",
    "dict_type": "{at}: must be a group of named values.",
    "finite_number": "{at}: must be a number.",
    "float_type": "{at}: must be a number.",
    "greater_than": "{at}: is not above {gt:,}.",
    "greater_than_equal": "{at}: is below {ge:,}.",
    "int_type": "{at}: must be a whole number{hint}.",
    "less_than_equal": "{at}: is above {le:,}.",
    "list_type": "{at}: must be a list.",
    "literal_error": "{at}: must be {expected}.",
    "missing": "{name}: is missing.",
    "string_type": "{at}: must be text.",
    "string_unicode": "{at}: is no Unicode text.",
    "too_long": "{name}: has {actual_length:,} entries, above {max_length:,}.",
    "tuple_type": "{at}: must be a list.",
}


def problems_of(error: ValidationError, cls: type, where: str) -> list[str]:
    """One line for each problem.

    Args:
        error: what was found.
        cls: the settings class that was to be built.
        where: stands before the keys.
    """
    found: dict[str, dict[Any, list[str]]] = {}
    for each in error.errors(include_url=False):
        keys = each["loc"]
        end = next((number for number, key in enumerate(keys) if str(key).startswith(MEMBER)), len(keys))
        lines = found.setdefault(_name(where, keys[:end]), {}).setdefault(keys[end : end + 1], [])
        lines += _lines_of(each, cls, keys[:end] + keys[end + 1 :], where)
    return [line for name, members in found.items() for line in _of_union(name, members)]


def _of_union(name: str, members: Mapping[Any, list[str]]) -> list[str]:
    """What is wrong for the member whose type the value has, such as a bound; or else that it has none of the types."""
    choices = list(members.values())
    fitting = [lines for lines in choices if not (lines[0].startswith(f"{name}=") and ": must be " in lines[0])]
    if fitting or len(choices) == 1:
        return (fitting or choices)[0]
    at = choices[0][0].rpartition(": must be ")[0]
    kinds = [lines[0].rpartition(": must be ")[2].rstrip(".").partition(";")[0] for lines in choices]
    return [f"{at}: must be {' or '.join(kinds)}."]


def joined(where: str, name: str) -> str:
    """A name behind those that lead to it; ``[0]``, ``=value`` and ``: text`` go without a dot."""
    return f"{where}.{name}" if where and name[:1] not in "[=:" else f"{where}{name}"


def _name(where: str, keys: Sequence[str | int]) -> str:
    return functools.reduce(joined, (f"[{key}]" if isinstance(key, int) else key or "''" for key in keys), where)


def _lines_of(error: ErrorDetails, cls: type, keys: Sequence[str | int], where: str) -> list[str]:
    kind, value, name = error["type"], error["input"], _name(where, keys)
    context: dict[str, Any] = {
        key: int(x) if isinstance(x, float) and x.is_integer() else x for key, x in error.get("ctx", {}).items()
    }
    if kind == REFUSED:
        return [joined(name, line) for line in context["lines"]]
    if kind in ("unexpected_keyword_argument", "invalid_key"):
        return [_unknown(str(error["loc"][-1]), value, _class_at(cls, keys[:-1]), _name(where, keys[:-1]))]
    if keys[-1:] == ("[key]",):
        return [f"{_name(where, keys[:-2])}: the key {value!r} is no text; put quotes around it."]
    if " or " in context.get("expected", ""):
        context["expected"] = f"one of {context['expected'].replace(' or ', ', ').replace(chr(39), '')}"
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e18
    hint = f"; write {value:.0f}" if is_whole else ""
    at = f"{name}{'=' * bool(name)}{value!r}"
    return [_LINES.get(kind, "{at}: {msg}.").format(at=at, name=name, hint=hint, msg=error["msg"], **context)]


def _class_at(cls: type, keys: Sequence[Any]) -> Any:
    """The settings class of a group."""
    hint: Any = cls
    for key in keys:
        if dataclasses.is_dataclass(hint):
            hint = get_type_hints(hint)[key]
        else:
            hint = get_args(hint)[0 if isinstance(key, int) else 1]  # of a list, of a dict
        if get_origin(hint) in (Union, types.UnionType):
            hint = next(choice for choice in get_args(hint) if choice is not type(None))
    return hint


def _unknown(key: str, value: Any, cls: Any, where: str) -> str:
    explanation = cls.explain_unknown(key, value) if hasattr(cls, "explain_unknown") else None
    return f"{_name(where, [key])}{explanation or f': there is no such key; {_nearest(key, cls, where)}'}"


def _nearest(name: str, cls: Any, where: str) -> str:
    """The nearest names as a person types them, with their group. A ``where`` that is a file is left out."""
    nested: dict[str, str] = {}  # the keys of the groups of this one; the first where several have one of that name
    for group, hint in get_type_hints(cls).items():
        for field in dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else ():
            nested.setdefault(field.name, f"{group}.{field.name}")
    if name in nested:  # depth=4 for model.depth=4
        return f"did you mean {joined(where, nested[name])}?"
    hint = did_you_mean(name, [field.name for field in dataclasses.fields(cls)])
    if hint.startswith("did you mean ") and where and all(part.isidentifier() for part in where.split(".")):
        hint = hint.replace(" mean ", f" mean {where}.").replace(" or ", f" or {where}.")
    return hint
