"""A toy for reinforcement learning: an answer is worth something if the model ends it soon, whatever it says.

A model that was trained on its conversations ends after any number of words; one that learns from the reward ends at
once. It shows whether the end of an answer is trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import setting
from nanochat_pl.tasks.base import (
    Completion,
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
)
from nanochat_pl.tasks.registry import task
from nanochat_pl.tasks.synthetic.stories import NAMES, THINGS

_WORDINGS = ("Name some things.", "What is there?", "Which things do you see?", "List things", "Say some words.")


@dataclass(frozen=True)
class EarlyStopSettings(TaskSettings):
    """A toy: answers of any length, rewarded if they end early."""

    size: int = setting(2_000, "Training conversations.", at_least=1)
    max_words: int = setting(16, "Most words of a training answer; 1 to so many are equally frequent.", at_least=2)
    within: int = setting(8, "Most tokens of an answer that is rewarded, its end token counted.", at_least=1)


@task("early_stop", EarlyStopSettings)
class EarlyStop(Task):
    """``Name some things.`` → ``keys shells toys``. The reward is 1 if the model ended its answer early, else 0."""

    judged = False  # no answer is right or wrong

    def __init__(self, settings: EarlyStopSettings, split: Split) -> None:
        start, size, step = limits("early_stop", settings, split)
        super().__init__("early_stop", split, size, start, step)
        self.settings = settings
        self.names = part_of(NAMES, split, "name")

    def made_of(self) -> Any:
        return own_settings(self.settings, TaskSettings)

    def conversation(self, index: int) -> Conversation:
        random = generator(self.name, self.split, index)
        question = f"I am {random.choice(self.names)}. {random.choice(_WORDINGS)}"
        return conversation_of(question, " ".join(random.choices(THINGS, k=random.randint(1, self.settings.max_words))))

    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        raise UserError("early_stop: no answer is right or wrong; it has a reward alone.", "Take it out of the tasks.")

    def reward(self, conversation: Conversation, completion: Completion) -> float:
        return float(completion.finished and len(completion.ids) <= self.settings.within)
