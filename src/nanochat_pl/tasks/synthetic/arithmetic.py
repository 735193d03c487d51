"""Two-operand arithmetic through the calculator: bare, and in stories of one step.

The answer calls the tool (``12+7``), and says what it gave in the tool's own digits (``12 + 7 = 19``), so that a small
model has only to copy. What is held out are pairs of operands, in either order and for all four operations: no pair of
the test part occurs in training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import setting
from nanochat_pl.tasks.base import (
    Content,
    Conversation,
    Part,
    Split,
    Task,
    TaskSettings,
    conversation_of,
    generator,
    is_held_out,
    limits,
    own_settings,
    same_last_number,
    tool_answer,
)
from nanochat_pl.tasks.registry import task
from nanochat_pl.tasks.synthetic.stories import NAMES, STORIES, THINGS
from nanochat_pl.tools.calculator import evaluate

_OPERATIONS = ("+", "-", "*", "/")
# How people write each operation between its operands; in the same three ways at first.
SIGNS = {
    "+": (" + ", "+", " plus "),
    "-": (" - ", "-", " minus "),
    "*": (" * ", "*", " times ", " x ", " multiplied by "),
    "/": (" / ", "/", " divided by ", " over "),
}
AROUND = (
    "{}",
    "{}?",
    "{} =",
    "{} = ?",
    "What is {}?",
    "what is {}",
    "What's {}?",
    "Compute {}.",
    "Calculate {}",
    "How much is {}?",
    "how much is {}",
    "Please compute {}.",
    "Can you tell me what {} is?",
    "Work out {}.",
    "Solve {}",
)
_SENTENCES = {
    "+": (
        "Add {a} and {b}.",
        "What is the sum of {a} and {b}?",
        "Add {b} to {a}",
        "What do {a} and {b} make together?",
    ),
    "-": ("Subtract {b} from {a}.", "Take {b} away from {a}", "What is the difference of {a} and {b}?"),
    "*": ("Multiply {a} by {b}.", "What is the product of {a} and {b}?", "Multiply {a} and {b}"),
    "/": ("Divide {a} by {b}.", "What is the quotient of {a} and {b}?", "What do you get if you divide {a} by {b}?"),
}
_SENTENCE_SHARE = 0.25
_NEGATIVE_SHARE = 0.2  # of differences
# Quotients: without remainder, else with at most two decimals, else whatever comes.
_WHOLE_SHARE, _SHORT_SHARE = 0.6, 0.25
_DIVISORS_OF_100 = (2, 4, 5, 10, 20, 25, 50)


@dataclass(frozen=True)
class Problem:
    """Two operands and what to do with them."""

    a: int
    operation: str
    b: int

    @property
    def held_out(self) -> bool:
        """Whether it belongs to the test part: a matter of the two numbers alone."""
        return is_held_out("operands", min(self.a, self.b), max(self.a, self.b))

    def answer(self) -> list[Part]:
        """The call of the tool and the sentence after it."""
        code = f"{self.a}{self.operation}{self.b}"
        output = evaluate(code)
        assert output is not None, code
        return tool_answer(code, output, f"{self.a} {self.operation} {self.b} = {output}")


@dataclass(frozen=True)
class ArithmeticSettings(TaskSettings):
    """Two-operand arithmetic with the calculator: ``What is 12 + 7?``, or a story of one step."""

    size: int = setting(10_000, "Training conversations.", at_least=1)
    max_operand: int = setting(999, "Largest operand.", at_least=20, at_most=10**6)
    small_operand: int = setting(99, "Largest operand of the small problems.", at_least=20)
    small_share: float = setting(0.75, "Share of the small problems.", at_least=0, at_most=1)

    def __post_init__(self) -> None:
        if self.small_operand > self.max_operand:
            raise UserError(f"small_operand={self.small_operand}: is above max_operand={self.max_operand}.")


@task("arithmetic", ArithmeticSettings)
class Arithmetic(Task):
    """``What is 12 + 7?`` in many wordings. An answer is right if it ends on the right number."""

    def __init__(self, settings: ArithmeticSettings, split: Split, name: str = "arithmetic") -> None:
        start, size, step = limits(name, settings, split)
        super().__init__(name, split, size, start, step)
        self.settings = settings

    def made_of(self) -> Any:
        return own_settings(self.settings, TaskSettings)

    def conversation(self, index: int) -> Conversation:
        random = generator(self.name, self.split, index)
        problem = self._problem(random, index, whole=False)
        signs, sentences = SIGNS[problem.operation], _SENTENCES[problem.operation]
        if random.random() < _SENTENCE_SHARE:
            question = random.choice(sentences).format(a=problem.a, b=problem.b)
        else:
            question = random.choice(AROUND).format(f"{problem.a}{random.choice(signs)}{problem.b}")
        return conversation_of(question, problem.answer())

    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        return same_last_number(conversation, answer)

    def _problem(self, random: Random, index: int, whole: bool) -> Problem:
        """A problem of this split. ``whole``: no operand is zero, no result negative or with a fraction."""
        operation = _OPERATIONS[index % len(_OPERATIONS)]
        small = random.random() < self.settings.small_share
        most = self.settings.small_operand if small else self.settings.max_operand
        while True:
            problem = Problem(*_operands(random, operation, most, whole))
            if problem.held_out == (self.split == "test"):
                return problem


def _operands(random: Random, operation: str, most: int, whole: bool) -> tuple[int, str, int]:
    least = 1 if whole else 0
    a, b = random.randint(least, most), random.randint(least, most)
    if operation == "-" and (whole or random.random() >= _NEGATIVE_SHARE):
        a, b = max(a, b), min(a, b)
    if operation == "/":
        kind = 0.0 if whole else random.random()
        if kind < _WHOLE_SHARE:
            # Two factors, one of them at most the root of the product, so that quotients of all sizes occur.
            small = random.randint(1, math.isqrt(most))
            factors = [small, random.randint(1, most // small)]
            random.shuffle(factors)
            a, b = factors[0] * factors[1], factors[1]
        elif kind < _WHOLE_SHARE + _SHORT_SHARE:
            b = random.choice([divisor for divisor in _DIVISORS_OF_100 if divisor <= most])
        else:
            b = max(b, 1)
    return a, operation, b


@dataclass(frozen=True)
class WordProblemSettings(ArithmeticSettings):
    """Stories of one step."""

    size: int = setting(4_000, "Training conversations.", at_least=1)


@task("word_problems", WordProblemSettings)
class WordProblems(Arithmetic):
    """Stories of one step. Some wordings occur in the test part alone: one in eight of its problems."""

    def __init__(self, settings: WordProblemSettings, split: Split, name: str = "word_problems") -> None:
        super().__init__(settings, split, name)

    def conversation(self, index: int) -> Conversation:
        random = generator(self.name, self.split, index)
        problem = self._problem(random, index, whole=True)
        # The last story of each operation is never trained on.
        stories = STORIES[problem.operation][: -1 if self.split == "train" else None]
        name, other = random.sample(NAMES, 2)
        story = random.choice(stories)
        question = story.format(a=problem.a, b=problem.b, name=name, other=other, things=random.choice(THINGS))
        return conversation_of(question, problem.answer())
