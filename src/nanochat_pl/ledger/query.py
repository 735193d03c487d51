"""Entries as a table: columns by name, conditions on them, an order."""

from __future__ import annotations

import fnmatch
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

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
# Between two conditions: behind it, quotation marks are closed.
_AND = re.compile(r"""\s+and\s+(?=(?:[^'"]|'[^']*'|"[^"]*")*$)""")
# What stands between two commas; those in quotes and brackets part nothing.
_ALTERNATIVE = re.compile(r"""(?:[^,'"\[\]]|'[^']*'|"[^"]*"|\[[^\]]*\]|['"\[\]])+""")


Matters = Callable[[Mapping[str, Any], str], Mapping[str, Any]]


class HasCells(Protocol):
    """What conditions are asked of: values by the names of columns."""

    @property
    def cells(self) -> Mapping[str, Any]: ...


AnyRow = TypeVar("AnyRow", bound=HasCells)


@dataclass(frozen=True)
class Condition:
    """One condition, as ``model.depth>=4``: the text, the column's name, the operator, the values as they are typed."""

    text: str
    name: str
    sign: str
    values: tuple[str, ...]

    def holds(self, found: Any) -> bool:
        """Whether it is true of a value."""
        if self.sign == "!=":
            return not any(_equals(found, value) for value in self.values)
        if self.sign in _EQUAL:
            return any(_equals(found, value) for value in self.values)
        value = _value(self.values[0])
        comparable = (_is_number(found) and _is_number(value)) or (isinstance(found, str) and isinstance(value, str))
        return comparable and _ORDER[self.sign](found, value)


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
        return cls(entry, cells_of(entry))


def cells_of(entry: Entry) -> dict[str, Any]:
    """All that an entry holds, by the names of columns."""
    groups = {f"{group}.{name}": value for group in _GROUPS for name, value in getattr(entry, group).items()}
    fields = {name: getattr(entry, name) for name in (*_PLAIN, *_NUMBERS)}
    return {**entry.settings, **entry.metrics, **groups, **fields}


def conditions(where: str, key: str = "where") -> list[Condition]:
    """The conditions of a text, ``model.depth>=4 and val/bpb<1.2``.

    A value is a number, true, false, null, or else text; unquoted text with ``*``, ``?`` or ``[`` is a glob. Behind
    ``=`` there may be several, joined by commas: one of them; behind ``!=``: none of them.

    Args:
        where: the conditions, joined by ``and``.
        key: under which they were given, for messages.

    Raises:
        UserError: one has not that form.
    """
    found = []
    for text in _AND.split(where.strip()):
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
                "Several values of one name are joined by commas: model.depth=2,4; ask once for each other part; or"
                " put quotes around a text that has such a word.",
            )
        several = tuple(each.strip() for each in _ALTERNATIVE.findall(value)) if sign in _EQUAL else (value,)
        found.append(Condition(text.strip(), name, sign, several or (value,)))
    return found


def condition_name(text: str) -> str | None:
    """The name of the column that a condition asks for; None: the text is no condition."""
    match = _CONDITION.fullmatch(text)
    return None if match is None else match[1]


def select(rows: Sequence[AnyRow], where: str, key: str = "where") -> list[AnyRow]:
    """The rows that fulfil all :func:`conditions`.

    Where a row has no such value, or one of another kind, nothing but ``!=`` is true of it.

    Raises:
        UserError: one has not that form, or names a column that no row has.
    """
    for condition in conditions(where, key):
        require_columns([condition.name], rows, key)
        rows = [row for row in rows if condition.holds(row.cells.get(condition.name))]
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


def require_columns(names: Sequence[str], rows: Sequence[HasCells], key: str) -> None:
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


def _equals(found: Any, text: str) -> bool:
    if isinstance(found, list):
        return re.sub(r"[\s'\"]", "", text) == f"[{','.join(map(str, found))}]"
    value = _value(text)
    if isinstance(value, str) and re.search(r"[*?\[]", value) and not text.startswith(("'", '"')):
        return isinstance(found, str) and fnmatch.fnmatchcase(found, value)
    # 1 is not true, and 1 is 1.0.
    return bool(found == value) and isinstance(found, bool) == isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
