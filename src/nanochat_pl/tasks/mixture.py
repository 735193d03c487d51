"""Tasks side by side, and their training conversations in one fixed order: evenly mixed, or task after task.

A share of them can be joined into conversations of several turns, as a chat has them.
"""

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
from nanochat_pl.tasks.published.conversations import ConversationSet, ConversationSettings, refuse_shared_conversations
from nanochat_pl.tasks.registry import kind_of
from nanochat_pl.tasks.settings import JoinedSettings, MixtureSettings, MixtureTasks

MAX_CONVERSATIONS = 50_000_000  # of an epoch, which are put in order in memory: more is a typing error


class Mixture:
    """All conversations of some tasks, each as often as its task says, in a seeded order.

    Without a sequence the order is a permutation of the whole: it depends on the seed and on the tasks' names, sizes
    and repeats alone. With one it is a permutation of the first task's, then of the second's, and so on.

    With ``joined`` a share of them stand in conversations of several turns: neighbours in that order, so that the
    subject changes at most turns, and each task's conversations occur as often as without. In a sequence none is of
    two tasks.

    Attributes:
        in_sequence: whether the tasks come one after the other; who packs them into rows must keep that order then.
        num_joined: conversations of several turns.
        num_turns: the tasks' conversations in them.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        repeats: Mapping[str, int],
        seed: int,
        sequence: Sequence[str] | None = None,
        joined: JoinedSettings | None = None,
    ) -> None:
        """
        Args:
            tasks: by name; their order does not matter.
            repeats: how often each conversation of a task occurs; once where a task is not named.
            seed: of the order.
            sequence: all names, in the order in which the tasks come; None: all conversations evenly mixed.
            joined: how many are joined into conversations of several turns; None: none.
        """
        assert sequence is None or sorted(sequence) == sorted(tasks), "a sequence names each task once"
        self.tasks = {name: tasks[name] for name in sequence or sorted(tasks)}
        self.repeats = {name: repeats.get(name, 1) for name in self.tasks}
        self.seed = seed
        self.in_sequence = sequence is not None
        self._names = list(self.tasks)
        self._require_bounded()
        self._ends = np.cumsum([len(task) * self.repeats[name] for name, task in self.tasks.items()])
        self._order = array("q", range(int(self._ends[-1])))
        self._put_in_order()
        self.joined = joined if joined is not None and joined.share > 0 else None
        # Where in the order each conversation begins, and where the last one ends.
        self._begins = self._join(self.joined) if self.joined else np.arange(len(self._order) + 1)
        sizes = np.diff(self._begins)
        self.num_joined, self.num_turns = int((sizes > 1).sum()), int(sizes[sizes > 1].sum())

    def _require_bounded(self) -> None:
        counts = {name: len(task) * self.repeats[name] for name, task in self.tasks.items()}
        if (total := sum(counts.values())) > MAX_CONVERSATIONS:
            name = max(counts, key=lambda name: counts[name])
            task, repeat = self.tasks[name], self.repeats[name]
            key = task.key if isinstance(task, ConversationSet) else f"mixture.tasks.{name}"
            of_others = f", and {total - counts[name]:,} of other tasks" if total > counts[name] else ""
            raise UserError(
                f"{key}.repeat={repeat}: its {len(task):,} conversations are {counts[name]:,} in an epoch"
                f" then{of_others}; at most {MAX_CONVERSATIONS:,} are put in order.",
                f"Lower {key}.repeat or {key}.size; max_steps and stage.num_epochs tell how long is trained.",
            )

    def _put_in_order(self) -> None:
        if not self.in_sequence:
            generator("mixture", self.seed).shuffle(self._order)
            return
        for name, start, end in zip(self._names, [0, *self._ends[:-1]], self._ends, strict=True):
            part = self._order[start:end]
            generator("mixture", self.seed, name).shuffle(part)
            self._order[start:end] = part

    def _join(self, joined: JoinedSettings) -> np.ndarray:
        """Move what is joined together, to where its first turn stands; where each conversation begins, and the end."""
        random = generator("mixture", self.seed, "joined")
        mean_turns = (2 + joined.max_turns) / 2
        # Of the conversations that begin, not of the turns.
        chance = joined.share / (joined.share + (1 - joined.share) * mean_turns)
        groups: list[list[int]] = []
        open_group: list[int] = []
        missing, last_task = 0, -1
        tasks = np.searchsorted(self._ends, self._order, side="right").tolist()
        for number, task in zip(self._order, tasks, strict=True):
            if self.in_sequence and task != last_task:
                missing = 0
            last_task = task
            if not self.tasks[self._names[task]].can_be_joined:
                groups.append([number])
            elif missing:
                open_group.append(number)
                missing -= 1
            else:
                groups.append(open_group := [number])
                missing = random.randint(2, joined.max_turns) - 1 if random.random() < chance else 0
        self._order = array("q", (number for group in groups for number in group))
        return np.cumsum([0, *map(len, groups)])

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitem__(self, index: int) -> Conversation:
        parts = [self.tasks[name][place] for name, place in self.places(index)]
        if len(parts) == 1:
            return parts[0]
        return {"messages": [message for part in parts for message in part["messages"]]}

    def place(self, index: int) -> tuple[str, int]:
        """Which task's which conversation stands at an index; of a joined one, the first."""
        return self.places(index)[0]

    def places(self, index: int) -> list[tuple[str, int]]:
        """Which tasks' which conversations the one at an index is made of, in the order of its turns."""
        if not 0 <= index < len(self):
            raise IndexError(f"mixture: conversation {index} of {len(self)}")
        begin, end = self._begins[index : index + 2]
        found = []
        for number in self._order[begin:end]:
            task = int(np.searchsorted(self._ends, number, side="right"))
            name = self._names[task]
            found.append((name, (number - int(self._ends[task])) % len(self.tasks[name])))
        return found

    def count_copies(self) -> int:
        """How many of the conversations that stand alone are copies of another one, as the tasks' repeats ask for."""
        alone = np.asarray(self._order)[self._begins[:-1][np.diff(self._begins) == 1]]
        tasks = np.searchsorted(self._ends, alone, side="right")
        starts = np.array([0, *self._ends[:-1]])[tasks]
        sizes = np.array([len(task) for task in self.tasks.values()])[tasks]
        first_copies = starts + (alone - starts) % sizes
        return len(alone) - len(np.unique(first_copies))

    def describe_joined(self) -> str:
        """A line on the conversations of several turns; empty where there are none."""
        if not self.num_joined:
            return ""
        alone = len(self) - self.num_joined
        return (
            f"Joined: {self.num_turns:,} of the tasks' conversations are turns of {self.num_joined:,} longer ones "
            f"(2 to {self.joined.max_turns if self.joined else 0}); {alone:,} stand alone."
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what the conversations are and how they are ordered: the key of caches made of them."""
        order = f"seed {self.seed}" + (", in sequence" if self.in_sequence else "")
        if self.joined:
            order += f", joined {self.joined.share} to {self.joined.max_turns}"
        digest = hashlib.sha256(f"mixture 1, {order}\n".encode())
        for name, task in self.tasks.items():
            digest.update(f"{name} x{self.repeats[name]} {task.fingerprint}\n".encode())
        return digest.hexdigest()


def build_mixture(settings: MixtureSettings, split: Split, context: TaskContext) -> Mixture:
    """The mixture of a stage: its training conversations, or those held out, each once, none joined, in no sequence."""
    tasks = build_tasks(settings.tasks, split, context)
    if split == "test":
        return Mixture(tasks, {}, settings.seed)
    repeats = {name: task.repeat for name, task in settings.tasks.chosen().items()}
    return Mixture(tasks, repeats, settings.seed, settings.sequence, settings.joined)


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
