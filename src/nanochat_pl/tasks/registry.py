"""Which tasks there are: each names itself, with its settings, where its class is defined.

A task is one file of ``published/`` or ``synthetic/`` (or of another package, which names its module as an entry point
of the group ``nanochat_pl.tasks``)::

    @task("capitals", CapitalsSettings)
    class Capitals(Task): ...
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from nanochat_pl.common.errors import UserError
from nanochat_pl.tasks.base import Task, TaskSettings

ENTRY_POINTS = "nanochat_pl.tasks"
# The names of tasks are keys of settings; this one stands for files of anybody's own.
CONVERSATIONS = "conversations"
# Modules of this package that are made of the tasks.
_ABOVE = {"nanochat_pl.tasks.mixture", "nanochat_pl.tasks.settings"}
_KINDS: dict[str, TaskKind] = {}
T = TypeVar("T", bound=type[Task])


@dataclass(frozen=True)
class TaskKind:
    """A task that one can choose.

    Attributes:
        name: its key under ``mixture.tasks``.
        settings: the dataclass of its settings; all of them have defaults.
        cls: the task's class.
    """

    name: str
    settings: type[TaskSettings]
    cls: type[Task]


def task(name: str, settings: type[TaskSettings]) -> Callable[[T], T]:
    """Register the class that stands under it as a task.

    Raises:
        UserError: it is no name, or another class has it.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name) or name == CONVERSATIONS:
        raise UserError(f"task {name!r}: a task's name has small letters, digits and _, and is not {CONVERSATIONS}.")

    def register(cls: T) -> T:
        there = _KINDS.get(name)
        if there is not None and _place(there.cls) != _place(cls):
            raise UserError(f"task {name!r}: there are two of that name, {_place(there.cls)} and {_place(cls)}.")
        _KINDS[name] = TaskKind(name, settings, cls)
        return cls

    return register


@cache
def all_tasks() -> dict[str, TaskKind]:
    """All tasks by name, in the order of their names. The first call imports their modules.

    Raises:
        UserError: a module that another package names cannot be imported, or its task has a name that is taken.
    """
    package = importlib.import_module("nanochat_pl.tasks")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module.name not in _ABOVE:
            importlib.import_module(module.name)
    for point in entry_points(group=ENTRY_POINTS):
        _load(point)
    return {name: _KINDS[name] for name in sorted(_KINDS)}


def kind_of(name: str) -> TaskKind | None:
    """The task of a name; None for files of somebody's own, whose names are theirs."""
    return all_tasks().get(name)


def _load(point: EntryPoint) -> None:
    origin = f"entry point {point.name} = {point.value}" + (f" of {point.dist.name}" if point.dist else "")
    try:
        point.load()
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(f"{origin}: cannot be imported: {error}", "Mend that package, or uninstall it.") from error


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
