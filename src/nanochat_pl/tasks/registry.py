"""Which tasks there are: each names itself, with its settings, where its class is defined.

A task is one file of ``published/`` or ``synthetic/`` (or of another package, which names its module as an entry point
of the group ``nanochat_pl.tasks``)::

    @task("capitals", CapitalsSettings)
    class Capitals(Task): ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from nanochat_pl.common.registry import Registry
from nanochat_pl.tasks.base import Task, TaskSettings

# The names of tasks are keys of settings; this one stands for files of anybody's own.
CONVERSATIONS = "conversations"
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


TASKS: Registry[TaskKind] = Registry(
    "task",
    package="nanochat_pl.tasks",
    group="nanochat_pl.tasks",
    reserved=(CONVERSATIONS,),
    left_out=("nanochat_pl.tasks.mixture", "nanochat_pl.tasks.settings"),
)


def task(name: str, settings: type[TaskSettings]) -> Callable[[T], T]:
    """Register the class that stands under it as a task.

    Raises:
        UserError: it is no name, or another class has it.
    """
    return TASKS.register(name, lambda cls: TaskKind(name, settings, cls))


@cache
def all_tasks() -> dict[str, TaskKind]:
    """All tasks by name, in the order of their names. The first call imports their modules.

    Raises:
        UserError: a module that another package names cannot be imported, or its task has a name that is taken.
    """
    return dict(sorted(TASKS.load().items()))


def tasks_with_reward() -> tuple[str, ...]:
    """Names of the tasks on which reinforcement learning can train."""
    return tuple(name for name, kind in all_tasks().items() if kind.cls.gives_reward())


def kind_of(name: str) -> TaskKind | None:
    """The task of a name; None for files of somebody's own, whose names are theirs."""
    return all_tasks().get(name)
