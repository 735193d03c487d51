"""Tasks side by side, and their training conversations in one fixed order: evenly mixed, or task after task."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from nanochat_pl.common.errors import UserError
from nanochat_pl.tasks.base import Conversation, Split, Task, TaskSettings, generator
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.conversations import ConversationSet, ConversationSettings, refuse_shared_conversations
from nanochat_pl.tasks.registry import kind_of
from nanochat_pl.tasks.settings import MixtureSettings, MixtureTasks


class Mixture:
    """All conversations of some tasks, each as often as its task says, in a seeded order.

    Without a sequence the order is a permutation of the whole: it depends on the seed and on the tasks' names, sizes
    and repeats alone. With one it is a permutation of the first task's, then of the second's, and so on.

    Attributes:
        in_sequence: whether the tasks come one after the other; who packs them into rows must keep that order then.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        repeats: Mapping[str, int],
        seed: int,
        sequence: Sequence[str] | None = None,
    ) -> None:
        """
        Args:
            tasks: by name; their order does not matter.
            repeats: how often each conversation of a task occurs; once where a task is not named.
            seed: of the order.
            sequence: all names, in the order in which the tasks come; None: all conversations evenly mixed.
        """
        assert sequence is None or sorted(sequence) == sorted(tasks), "a sequence names each task once"
        self.tasks = {name: tasks[name] for name in sequence or sorted(tasks)}
        self.repeats = {name: repeats.get(name, 1) for name in self.tasks}
        self.seed = seed
        self.in_sequence = sequence is not None
        self._names = list(self.tasks)
        self._ends = np.cumsum([len(task) * self.repeats[name] for name, task in self.tasks.items()])
        self._order = array("q", range(int(self._ends[-1])))
        if not self.in_sequence:
            generator("mixture", seed).shuffle(self._order)
            return
        for name, start, end in zip(self._names, [0, *self._ends[:-1]], self._ends, strict=True):
            part = self._order[start:end]
            generator("mixture", seed, name).shuffle(part)
            self._order[start:end] = part

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Conversation:
        name, place = self.place(index)
        return self.tasks[name][place]

    def place(self, index: int) -> tuple[str, int]:
        """Which task's which conversation stands at an index."""
        if not 0 <= index < len(self):
            raise IndexError(f"mixture: conversation {index} of {len(self)}")
        number = self._order[index]
        task = int(np.searchsorted(self._ends, number, side="right"))
        name = self._names[task]
        return name, (number - int(self._ends[task])) % len(self.tasks[name])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what the conversations are and how they are ordered: the key of caches made of them."""
        order = f"seed {self.seed}" + (", in sequence" if self.in_sequence else "")
        digest = hashlib.sha256(f"mixture 1, {order}\n".encode())
        for name, task in self.tasks.items():
            digest.update(f"{name} x{self.repeats[name]} {task.fingerprint}\n".encode())
        return digest.hexdigest()


def build_mixture(settings: MixtureSettings, split: Split, context: TaskContext) -> Mixture:
    """The mixture of a stage: its training conversations, or the held-out ones, without repeats and sequence."""
    tasks = build_tasks(settings.tasks, split, context)
    if split == "test":
        return Mixture(tasks, {}, settings.seed)
    repeats = {name: task.repeat for name, task in settings.tasks.chosen().items()}
    return Mixture(tasks, repeats, settings.seed, settings.sequence)


def build_tasks(settings: MixtureTasks, split: Split, context: TaskContext) -> dict[str, Task]:
    """The chosen tasks by name.

    Args:
        settings: which tasks, each with its settings.
        split: which part of each.
        context: what they may use.

    Raises:
        UserError: what the tasks say of their files, all tasks together; or two of them share conversations and
            split them otherwise.
    """
    tasks: dict[str, Task] = {}
    errors: list[UserError] = []
    for name, task in settings.chosen().items():
        try:
            tasks[name] = _build_task(name, task, split, context)
        except UserError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else _together(errors)
    refuse_shared_conversations(task for task in tasks.values() if isinstance(task, ConversationSet))
    return tasks


def only_judged(settings: MixtureSettings) -> MixtureSettings | None:
    """The mixture without the conversations in which no answer is right or wrong; None where nothing else is left."""
    kinds = {name: kind_of(name) for name in settings.tasks.chosen()}
    judged = {name for name, kind in kinds.items() if kind is not None and kind.cls.judged}
    return replace(settings, tasks=settings.tasks.only(judged), sequence=None) if judged else None


def _together(errors: Sequence[UserError]) -> UserError:
    """Several errors as one: each problem, and each thing to do once."""
    problems = [problem for error in errors for problem in error.problems]
    return UserError(problems, "\n".join(dict.fromkeys(error.fix for error in errors if error.fix)))


def _build_task(name: str, settings: TaskSettings, split: Split, context: TaskContext) -> Task:
    kind = kind_of(name)
    if kind is not None:
        return kind.cls.from_settings(settings, split, context)
    assert isinstance(settings, ConversationSettings), name
    return ConversationSet(name, settings, split, context)
