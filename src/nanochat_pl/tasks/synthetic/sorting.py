"""Sorting some numbers.

What is held out are sets of numbers (with how often each occurs): none of the test part is sorted in training, in
whatever order it is given there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import Any

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
    is_held_out,
    limits,
    own_settings,
    reference_of,
    text_of,
)
from nanochat_pl.tasks.registry import task
from nanochat_pl.tasks.synthetic.places import reward_of_places

_WORDINGS = (
    "Sort these numbers: {numbers}",
    "Sort {numbers}",
    "sort {numbers}",
    "Put these numbers in order: {numbers}",
    "Sort the numbers {numbers} from small to large.",
    "What are {numbers} in ascending order?",
)
# A sign behind a digit separates two numbers: 1-3 is no negative three.
_NUMBER = re.compile(r"(?<!\d)-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class SortingSettings(TaskSettings):
    """``Sort these numbers: 7 3 9 1 5``."""

    size: int = setting(10_000, "Training conversations.", at_least=1)
    # Fewer, or from a smaller range: a set for the test part might not exist.
    count: int = setting(5, "How many numbers are to be sorted.", at_least=3, at_most=50)
    max_number: int = setting(9, "Largest number; the smallest is 0.", at_least=9, at_most=10**6)
    partial_reward: bool = setting(False, "Reward of a wrong answer: the share of places that are right, instead of 0.")


@task("sorting", SortingSettings)
class Sorting(Task):
    """``Sort these numbers: 7 3 9 1 5`` → ``1 3 5 7 9``. Right if these are the numbers of the answer, in this order.

    What stands between them makes no difference, nor do words around them.
    """

    def __init__(self, settings: SortingSettings, split: Split) -> None:
        start, size, step = limits("sorting", settings, split)
        super().__init__("sorting", split, size, start, step)
        self.settings = settings

    def made_of(self) -> Any:
        return own_settings(self.settings, TaskSettings)

    def conversation(self, index: int) -> Conversation:
        random = generator(self.name, self.split, index)
        numbers = self._numbers(random)
        question = random.choice(_WORDINGS).format(numbers=_joined(numbers))
        return conversation_of(question, _joined(sorted(numbers)))

    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        return _numbers_of(answer) == _numbers_of(reference_of(conversation))

    def reward(self, conversation: Conversation, completion: Completion) -> float:
        expected = _numbers_of(reference_of(conversation))
        return reward_of_places(expected, _numbers_of(completion.content), self.settings.partial_reward)

    def _numbers(self, random: Random) -> list[int]:
        while True:
            numbers = [random.randint(0, self.settings.max_number) for _ in range(self.settings.count)]
            if is_held_out("numbers", *sorted(numbers)) == (self.split == "test"):
                return numbers


def _joined(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def _numbers_of(answer: Content) -> list[str]:
    """The numbers of an answer as they are written: 07 is none of the numbers that were to be sorted."""
    return _NUMBER.findall(text_of(answer))
