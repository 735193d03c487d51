"""What the names of files say: which split a file holds, and which configuration. One rule for all who read files."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

_SPLITS = r"(?:(train|training)|(validation|valid|val|dev|eval)|(test))"
_IN_NAME = re.compile(rf"(?:^|[._-]){_SPLITS}(?=[._-])", re.IGNORECASE)
_FOLDER = re.compile(rf"(?:partial-)?{_SPLITS}", re.IGNORECASE)
_MARKED = ("train", "val", "test")
_MAX_NAMED = 4


@dataclass(frozen=True)
class SplitByName(Generic[T]):
    """Files by the splits in their names: trained on, held out, and of no use because validation files are there."""

    train: list[T]
    held_out: list[T]
    unused: list[T]


def split_in_name(path: str) -> str | None:
    """``train``, ``val`` or ``test``, if a file's path says which it holds.

    A part of the file's own name tells; else the nearest folder that has the name of a split and no other word in it.
    """
    *folders, name = path.split("/")
    for match in (_IN_NAME.search(name), *(_FOLDER.fullmatch(folder) for folder in reversed(folders))):
        if match and match.lastindex:
            return _MARKED[match.lastindex - 1]
    return None


def split_files(files: Sequence[T], name_of: Callable[[T], str]) -> SplitByName[T] | None:
    """The files that are trained on and those held out, where names say it: validation files, else test files.

    None where the names part nothing. A file whose name says nothing is trained on.
    """
    by_mark: dict[str, list[T]] = {mark: [] for mark in _MARKED}
    for file in files:
        by_mark[split_in_name(name_of(file)) or "train"].append(file)
    train, val, test = by_mark.values()
    if not train or not (val or test):
        return None
    return SplitByName(train, val or test, test if val else [])


def configurations(paths: Sequence[str]) -> list[str]:
    """The folders that may each be a configuration of one data set: of several, each with files to train on."""
    folders = [[part for part in path.split("/")[:-1] if not _FOLDER.fullmatch(part)] for path in paths]
    return sorted({"/".join(parts) for parts in folders}) if len({tuple(parts) for parts in folders}) > 1 else []


def configurations_remark(paths: Sequence[str], setting: str) -> list[str]:
    """A line that names the configurations of a data set of which all are trained on; none where there is one.

    ``setting`` is what takes one of them, with ``{}`` for its name.
    """
    names = configurations(paths)
    if not names:
        return []
    named = ", ".join(name or "(the top)" for name in names[:_MAX_NAMED])
    more = f" and {len(names) - _MAX_NAMED:,} more" if len(names) > _MAX_NAMED else ""
    one = next(name for name in names if name)
    return [
        f"trained on are the files of {len(names):,} folders ({named}{more}), which may be configurations with the same"
        f" text; {setting.replace('{}', one)} takes one"
    ]


def unused_remark(names: Sequence[str]) -> list[str]:
    """A line that names test files which are not used, because there are validation files."""
    if not names:
        return []
    files = f"{names[0]} is" if len(names) == 1 else f"{len(names):,} files, the first {names[0]}, are"
    return [f"{files} not used: by name for tests, and there is a validation file"]
