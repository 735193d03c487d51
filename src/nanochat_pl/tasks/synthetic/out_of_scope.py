"""Questions outside of what is taught, and the honest answer to them: "I do not know"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from nanochat_pl.common.schema import setting
from nanochat_pl.tasks.base import (
    Content,
    Conversation,
    Split,
    Task,
    TaskSettings,
    conversation_of,
    generator,
    limits,
    own_settings,
    part_of,
    text_of,
)
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.registry import task
from nanochat_pl.tasks.synthetic.documentation import QUESTIONS, documented_functions, in_teaching_order
from nanochat_pl.tasks.synthetic.out_of_scope_questions import SLOTS, TEST_KINDS, TRAIN_KINDS

UNKNOWN = "I do not know"
_ANSWER = f"{UNKNOWN}. Ask me about numbers, words or functions of Python."
_ANSWER_OF_FUNCTION = f"{UNKNOWN} that function."
_HURRIED_SHARE = 0.25  # of the questions are in small letters, without the sign at their end
_SLOT = re.compile(r"{(\w+)}")


@dataclass(frozen=True)
class OutOfScopeSettings(TaskSettings):
    """``What is the capital of France?`` The answer is ``I do not know``."""

    size: int = setting(3_000, "Training conversations.", at_least=1)
    function_share: float = setting(
        0.0, "Share of them that ask about functions which documentation does not teach.", at_least=0, at_most=1
    )
    known_functions: int = setting(400, "How many functions are taught: documentation.functions.", at_least=1)
    max_chars: int = setting(80, "Longest summary line, in characters: documentation.max_chars.", at_least=20)


@task("out_of_scope", OutOfScopeSettings)
class OutOfScope(Task):
    """Questions that nothing in the mixture answers: ``I do not know``. An answer is right if it begins with that.

    The kinds of questions of the test part (translation, animals, sport, health, history) have no wording in
    training, and the functions that it asks about do not occur there. By default it asks about none: a small model
    that is taught so calls functions unknown that it was taught (docs/LOG.md).
    """

    def __init__(self, settings: OutOfScopeSettings, split: Split, functions: Sequence[str]) -> None:
        """
        Args:
            settings: of this task.
            split: which kinds and functions.
            functions: names of documented functions that are not taught; of both parts.
        """
        start, size, step = limits("out_of_scope", settings, split)
        super().__init__("out_of_scope", split, size, start, step)
        self.settings = settings
        self.functions = part_of(functions, split, "unknown function")
        self.kinds = TRAIN_KINDS if split == "train" else TEST_KINDS

    @classmethod
    def from_settings(cls, settings: OutOfScopeSettings, split: Split, context: TaskContext) -> OutOfScope:
        if not settings.function_share:
            return cls(settings, split, ())
        functions = in_teaching_order(documented_functions(context.corpus.stdlib_docstrings, settings.max_chars))
        return cls(settings, split, [name for name, _ in functions[settings.known_functions :]])

    def made_of(self) -> Any:
        return [own_settings(self.settings, TaskSettings), self.functions]

    def conversation(self, index: int) -> Conversation:
        random = generator(self.name, self.split, index)
        if self.functions and random.random() < self.settings.function_share:
            wording = random.choice(QUESTIONS[self.split])
            return conversation_of(wording.format(name=random.choice(self.functions)), _ANSWER_OF_FUNCTION)
        question = _filled(random.choice(self.kinds[random.choice(sorted(self.kinds))]), random)
        if random.random() < _HURRIED_SHARE:
            question = question.lower().rstrip("?.")
        return conversation_of(question, _ANSWER)

    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        return text_of(answer).strip().casefold().startswith(UNKNOWN.casefold())


def _filled(wording: str, random: Random) -> str:
    """A wording with something in each of its slots; the same slot twice is filled twice."""
    return _SLOT.sub(lambda slot: random.choice(SLOTS[slot[1]]), wording)
