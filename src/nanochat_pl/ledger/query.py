"""Entries as a table: columns by name, conditions on them, an order."""

from __future__ import annotations

import fnmatch
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.ledger.entry import Entry

# Columns that are shown where none are named, besides the settings in which the entries differ.
USUAL = ("run", "stage", "exit", "steps", "tokens", "seconds", "val/bpb")
MAX_SETTINGS = 6
# Settings that say where things are and nothing of what was trained.
_PLACES = ("paths.", "logger.")
# Many keys that experiments set, and that seldom are what one compares.
_LESS_TOLD = ("evaluation.", "mixture.", "schedule.", "stage.", "trainer.")
_PLAIN = ("run", "stage", "exit", "time", "error", "parent_run", "data", "tokenizer")
_NUMBERS = ("steps", "tokens", "flops", "seconds")
_GROUPS = ("git", "machine", "best", "errors", "inference", "inference_on")
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_EQUAL = ("=", "==", "!=")
_CONDITION = re.compile(r"\s*([\w./+-]+)\s*(>=|<=|!=|==|=|>|<)\s*(.*?)\s*")


Matters = Callable[[Mapping[str, Any], str], Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """An entry, and all that it holds by the names of columns.

    Settings (``model.depth``) and metrics (``val/bpb``) have their own names; ``best.val/bpb``, ``errors.val/bpb``,
    ``machine.host`` and ``git.commit`` have that of their group before them.
    """

    entry: Entry
    cells: Mapping[str, Any]

    @classmethod
    def of(cls, entry: Entry) -> Row:
        return cls(entry, _cells(entry))


def _cells(entry: Entry) -> dict[str, Any]:
    groups = {f"{group}.{name}": value for group in _GROUPS for name, value in getattr(entry, group).items()}
    fields = {name: getattr(entry, name) for name in (*_PLAIN, *_NUMBERS)}
    return {**entry.settings, **entry.metrics, **groups, **fields}


def select(rows: Sequence[Row], where: str, key: str = "where") -> list[Row]:
    """The rows that fulfil all conditions, ``model.depth>=4 and val/bpb<1.2``.

    A value is a number, true, false, null, or else text; unquoted text with ``*``, ``?`` or ``[`` is a glob. Where a
    row has no such value, or one of another kind, nothing but ``!=`` is true of it.

    Args:
        rows: to choose from.
        where: the conditions, joined by ``and``.
        key: under which they were given, for messages.

    Raises:
        UserError: one has not that form, or names a column that no row has.
    """
    for text in re.split(r"\s+and\s+", where.strip()):
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise UserError(
                f"{key}={where}: {text!r} is no condition.",
                f"Write NAME OPERATOR VALUE, joined by and: {key}='model.depth>=4 and val/bpb<1.2'",
            )
        name, sign, value = match.groups()
        if re.search(r"\s(or|and|not)\s", f" {value} ", re.IGNORECASE) and not value.startswith(("'", '"')):
            raise UserError(
                f"{key}={where}: {text!r}: conditions are joined by and alone.",
                "Ask once for each part; or put quotes around a text that has such a word.",
            )
        require_columns([name], rows, key)
        holds = _holds_glob if _is_glob(value) and sign in _EQUAL else _holds
        rows = [row for row in rows if holds(row.cells.get(name), sign, _value(value))]
    return list(rows)


def ordered(rows: Sequence[Row], by: str, key: str = "sort") -> list[Row]:
    """The rows in ascending order of a column, ``-NAME``: descending. Those that lack it come last.

    Raises:
        UserError: no row has such a column.
    """
    name = by.removeprefix("-")
    require_columns([name], rows, key)

    def place(row: Row) -> tuple[bool, float, str]:  # numbers before texts: a setting may be a number or auto
        value = row.cells[name]
        return (False, value, "") if _is_number(value) else (True, 0, str(value))

    there = sorted((row for row in rows if row.cells.get(name) is not None), key=place, reverse=by.startswith("-"))
    return [*there, *(row for row in rows if row.cells.get(name) is None)]


def require_columns(names: Sequence[str], rows: Sequence[Row], key: str) -> None:
    """Raise :class:`UserError` for names of columns that no row has, where there are rows."""
    known = {name for row in rows for name in row.cells}
    wrong = [name for name in names if name not in known and name not in USUAL]
    if wrong and rows:
        raise UserError(
            [f"{key}={name}: no entry has such a column; {did_you_mean(name, known)}" for name in wrong],
            "All of them, with their values: nanochat-pl runs format=json",
        )


def usual_columns(entries: Sequence[Entry], matters: Matters | None = None) -> tuple[list[str], list[str]]:
    """The columns of a table where none are named.

    Args:
        entries: what it shows.
        matters: of all settings of a stage those that its result depends on; None: all are taken to.

    Returns:
        the columns, with the settings that differ between the entries, :data:`MAX_SETTINGS` at most; and the settings
        that differ, too, and had no place. The seed comes first, and last what no result depends on.
    """
    names = sorted({name for entry in entries for name in entry.changed if not name.startswith(_PLACES)})
    missing = object()
    differ = [
        name for name in names if any(e.settings.get(name, missing) != entries[0].settings.get(name) for e in entries)
    ]
    decisive = set(differ) if matters is None else set().union(*(matters(e.settings, e.stage) for e in entries))
    differ.sort(key=lambda name: (name != "seed", name not in decisive, name.startswith(_LESS_TOLD), name))
    return [*USUAL[:2], *differ[:MAX_SETTINGS], *USUAL[2:]], differ[MAX_SETTINGS:]


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    return value[1:-1] if isinstance(value, str) and re.fullmatch(r"'.*'", value) else value


def _holds(found: Any, sign: str, value: Any) -> bool:
    if sign in _EQUAL:
        # 1 is not true, and 1 is 1.0.
        same = found == value and isinstance(found, bool) == isinstance(value, bool)
        return same == (sign != "!=")
    comparable = (_is_number(found) and _is_number(value)) or (isinstance(found, str) and isinstance(value, str))
    return comparable and _ORDER[sign](found, value)


def _is_glob(text: str) -> bool:
    return bool(re.search(r"[*?\[]", text)) and isinstance(_value(text), str) and not text.startswith(("'", '"'))


def _holds_glob(found: Any, sign: str, pattern: str) -> bool:
    return (isinstance(found, str) and fnmatch.fnmatchcase(found, pattern)) == (sign != "!=")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
