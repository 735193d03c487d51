"""Tasks side by side, and their training conversations in one fixed, even order."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from nanochat_pl.data.python_docs import PythonDocs, open_python_docs
from nanochat_pl.data.sources import MAX_BAD_FRACTION
from nanochat_pl.tasks.arithmetic import Arithmetic, WordProblems
from nanochat_pl.tasks.base import Conversation, Split, Task, generator
from nanochat_pl.tasks.conversations import ConversationSet, refuse_shared_conversations
from nanochat_pl.tasks.documentation import Documentation, documented_functions
from nanochat_pl.tasks.identity import Identity
from nanochat_pl.tasks.settings import (
    ArithmeticSettings,
    ConversationSettings,
    DocumentationSettings,
    IdentitySettings,
    LetterCountingSettings,
    MixtureSettings,
    MixtureTasks,
    SpellingSettings,
    TaskSettings,
    WordProblemSettings,
)
from nanochat_pl.tasks.spelling import LetterCounting, Spelling
from nanochat_pl.tasks.words import corpus_words


class Mixture:
    """All conversations of some tasks, each as often as its task says, in a seeded order.

    The order is a permutation of the whole: it depends on the seed and on the tasks' names, sizes and repeats alone.
    """

    def __init__(self, tasks: Mapping[str, Task], repeats: Mapping[str, int], seed: int) -> None:
        """
        Args:
            tasks: by name; their order does not matter.
            repeats: how often each conversation of a task occurs; once where a task is not named.
            seed: of the order.
        """
        self.tasks = {name: tasks[name] for name in sorted(tasks)}
        self.repeats = {name: repeats.get(name, 1) for name in self.tasks}
        self.seed = seed
        self._names = list(self.tasks)
        self._ends = np.cumsum([len(task) * self.repeats[name] for name, task in self.tasks.items()])
        self._order = array("q", range(int(self._ends[-1])))
        generator("mixture", seed).shuffle(self._order)

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
        digest = hashlib.sha256(f"mixture 1, seed {self.seed}\n".encode())
        for name, task in self.tasks.items():
            digest.update(f"{name} x{self.repeats[name]} {task.fingerprint}\n".encode())
        return digest.hexdigest()


def build_mixture(
    settings: MixtureSettings, split: Split, cache_dir: Path, max_bad_fraction: float = MAX_BAD_FRACTION
) -> Mixture:
    """The mixture of a stage: its training conversations, or the held-out ones (then without repeats)."""
    repeats = {name: task.repeat for name, task in settings.tasks.chosen().items()} if split == "train" else {}
    return Mixture(build_tasks(settings, split, cache_dir, max_bad_fraction), repeats, settings.seed)


def build_tasks(
    settings: MixtureSettings, split: Split, cache_dir: Path, max_bad_fraction: float = MAX_BAD_FRACTION
) -> dict[str, Task]:
    """The chosen tasks by name.

    Args:
        settings: config group ``mixture``.
        split: which part of each.
        cache_dir: where the python_docs corpus is kept (it is opened or built only where a task needs it) and where
            files of conversations that were read are.
        max_bad_fraction: the share of bad rows in such files that is put up with (``data.max_bad_fraction``).

    Raises:
        UserError: what the tasks say of their files; two of them share conversations and split them otherwise.
    """
    chosen = settings.tasks.chosen()
    needs_corpus = any(isinstance(task, (SpellingSettings, DocumentationSettings)) for task in chosen.values())
    corpus = open_python_docs(cache_dir) if needs_corpus else None
    tasks: dict[str, Task] = {}
    for name, task in chosen.items():
        if isinstance(task, ConversationSettings):
            tasks[name] = ConversationSet(name, task, split, cache_dir, max_bad_fraction)
        else:
            tasks[name] = _build_task(task, split, corpus)
    refuse_shared_conversations(task for task in tasks.values() if isinstance(task, ConversationSet))
    return tasks


def only_judged(settings: MixtureSettings) -> MixtureSettings | None:
    """The mixture without the conversations in which no answer is right or wrong; None where nothing else is left."""
    others = {name: t for name, t in settings.tasks.chosen().items() if not isinstance(t, ConversationSettings)}
    return replace(settings, tasks=MixtureTasks(**others)) if others else None  # type: ignore[arg-type]


def _build_task(settings: TaskSettings, split: Split, corpus: PythonDocs | None) -> Task:
    match settings:
        case WordProblemSettings():
            return WordProblems(settings, split)
        case ArithmeticSettings():
            return Arithmetic(settings, split)
        case IdentitySettings():
            return Identity(settings, split)
    assert corpus is not None
    match settings:
        case LetterCountingSettings():
            return LetterCounting(settings, split, corpus_words(corpus, settings))
        case SpellingSettings():
            return Spelling(settings, split, corpus_words(corpus, settings))
        case DocumentationSettings():
            return Documentation(settings, split, documented_functions(corpus.stdlib_docstrings, settings.max_chars))
    raise TypeError(f"no task for {type(settings).__name__}")
