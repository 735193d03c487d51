"""Settings of the config group ``mixture``: which tasks, how much of each, and in which order."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Literal, TypeVar

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import setting
from nanochat_pl.tasks.base import TaskSettings
from nanochat_pl.tasks.published.conversations import ConversationSettings
from nanochat_pl.tasks.registry import all_tasks
from nanochat_pl.tasks.synthetic.documentation import DocumentationSettings
from nanochat_pl.tasks.synthetic.out_of_scope import OutOfScopeSettings

T = TypeVar("T", bound=type)


def _with_a_field_per_task(cls: T) -> T:
    """Give a settings class, before it becomes a dataclass, a field for each task that there is."""
    kinds = all_tasks()
    cls.__annotations__ = {**{name: kind.settings | None for name, kind in kinds.items()}, **cls.__annotations__}
    for name, kind in kinds.items():
        first_line = (inspect.getdoc(kind.settings) or "").partition("\n")[0]
        reward = " Has a reward." if kind.cls.gives_reward() else ""
        setattr(cls, name, setting(None, first_line.replace("`", "") + reward))
    return cls


@dataclass(frozen=True)
@_with_a_field_per_task
class MixtureTasks:
    """The tasks by name: ``{}`` takes one with its defaults; null, or not being named, leaves it out."""

    conversations: dict[str, ConversationSettings | None] = setting(
        factory=dict, doc="Conversations out of files, by a name of yours: conversations.NAME.path=…"
    )

    def __post_init__(self) -> None:
        problems = []
        for name in self.conversations:
            if not re.fullmatch(r"\w[\w-]{0,63}", name):
                problems.append(f"conversations.{name}: names have letters, digits, _ and -, 64 at most.")
            if name in all_tasks():
                problems.append(f"conversations.{name}: a task has that name; take another one.")
        problems += self._functions_taught_and_not()
        if problems:
            raise UserError(problems)

    def _functions_taught_and_not(self) -> list[str]:
        """What one task teaches, the other must not call unknown."""
        taught, unknown = (self.chosen().get(name) for name in ("documentation", "out_of_scope"))
        if not isinstance(taught, DocumentationSettings) or not isinstance(unknown, OutOfScopeSettings):
            return []
        pairs = [("known_functions", "functions"), ("max_chars", "max_chars")]
        return [
            f"out_of_scope.{mine}={getattr(unknown, mine)}: but documentation.{theirs}={getattr(taught, theirs)};"
            " give both the same, or functions are taught and called unknown."
            for mine, theirs in pairs
            if unknown.function_share and getattr(unknown, mine) != getattr(taught, theirs)
        ]

    def chosen(self) -> dict[str, TaskSettings]:
        """The tasks that are not left out, in the order of their names; those of one's own files at the end."""
        pairs = {name: getattr(self, name) for name in all_tasks()} | self.conversations
        return {name: settings for name, settings in pairs.items() if settings is not None}

    def only(self, names: set[str]) -> MixtureTasks:
        """These tasks with those of the names alone."""
        own = {name: settings for name, settings in self.conversations.items() if name in names}
        tasks = {name: getattr(self, name) for name in all_tasks() if name in names}
        return MixtureTasks(**tasks, conversations=own)


# What is in configs/mixture/default.yaml: all that need nothing but this machine and that a small model learns.
DEFAULT_TASKS = (
    "arithmetic",
    "word_problems",
    "spelling",
    "letter_counting",
    "identity",
    "documentation",
    "out_of_scope",
)


def default_tasks() -> MixtureTasks:
    """The tasks of the default chat model, with the defaults of each."""
    tasks = {name: all_tasks()[name].settings() for name in DEFAULT_TASKS}
    return MixtureTasks(**tasks)  # type: ignore[arg-type]


@dataclass(frozen=True)
class JoinedSettings:
    """Conversations of several turns, made of the tasks' conversations of one question."""

    share: float = setting(
        0.0, "Share of the tasks' conversations that become turns of a joined one; 0: none.", at_least=0, at_most=1
    )
    max_turns: int = setting(6, "Most conversations that are joined into one; at least 2 are.", at_least=2, at_most=100)


@dataclass(frozen=True)
class MixtureSettings:
    """The conversations of a stage: tasks in one seeded order, or one after the other."""

    tasks: MixtureTasks = setting(factory=default_tasks, doc="The tasks by name, each with its settings.")
    sequence: list[str] | None = setting(
        None,
        "A curriculum: these tasks one after the other, each in a seeded order; null: all of them evenly mixed.",
    )
    seed: int = setting(0, "Seed of the order of the training conversations.", at_least=0)
    packing: Literal["pad", "pad_one", "stream"] = setting(
        "pad",
        "How conversations become rows. pad: whole ones, as many as fit best, the rest padding; pad_one: one to a row; "
        "stream: end to end, cut into rows anywhere.",
    )
    joined: JoinedSettings = setting(factory=JoinedSettings, doc="Conversations of several turns.")

    def __post_init__(self) -> None:
        chosen = self.tasks.chosen()
        if not chosen:
            raise UserError(
                f"tasks: no task is chosen; there are {', '.join(all_tasks())}, and files of your own: "
                "conversations.NAME.path=…"
            )
        if self.sequence is None:
            return
        problems = []
        if unknown := [name for name in self.sequence if name not in chosen]:
            problems.append(f"sequence: {', '.join(unknown)}: no task of the mixture; there are {', '.join(chosen)}.")
        if twice := sorted({name for name in self.sequence if self.sequence.count(name) > 1}):
            problems.append(f"sequence: {', '.join(twice)}: more than once; tasks.NAME.repeat=… repeats a task.")
        if missing := [name for name in chosen if name not in self.sequence]:
            problems.append(f"sequence: {', '.join(missing)}: left out; name it, or leave out the task: NAME: null.")
        if problems:
            raise UserError(problems)
