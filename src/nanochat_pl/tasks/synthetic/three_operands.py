"""Arithmetic with three operands through the calculator.

Some of the training answers may be given without the tool (``tool_share``), so that a model still has to find out that
calling it pays. What is held out are triples of operands, in whatever order and with whatever operations.
"""

from __future__ import annotations

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
    numbers_of,
    own_settings,
    same_last_number,
    tool_answer,
)
from nanochat_pl.tasks.registry import task
from nanochat_pl.tasks.synthetic.arithmetic import AROUND, SIGNS
from nanochat_pl.tools.calculator import evaluate

_OPERATIONS = ("+", "-", "*")
_FORMS = ("{a}{s}{b}{t}{c}", "({a}{s}{b}){t}{c}", "{a}{s}({b}{t}{c})")
_PLAIN_SHARE = 0.6  # without parentheses
_NUM_STYLES = 3  # " + ", "+" and " plus ", and the same of the other operations


@dataclass(frozen=True)
class ThreeOperandsSettings(TaskSettings):
    """Arithmetic with three operands and the calculator: ``What is 12 + 7 * (30 - 4)?``"""

    size: int = setting(10_000, "Training conversations.", at_least=1)
    max_operand: int = setting(99, "Largest operand; the smallest is 0.", at_least=9, at_most=10**4)
    tool_share: float = setting(
        1.0,
        "Share of the training answers that call the calculator; the others say the result alone.",
        at_least=0,
        at_most=1,
    )
    tool_bonus: float = setting(
        0.0,
        "Reward, besides 1 for the right number, of an answer that called the calculator and says what it gave.",
        at_least=0,
        at_most=1,
    )


@task("three_operands", ThreeOperandsSettings)
class ThreeOperands(Task):
    """``What is 12 + 7 * (30 - 4)?`` in many wordings. An answer is right if it ends on the right number."""

    def __init__(self, settings: ThreeOperandsSettings, split: Split) -> None:
        start, size, step = limits("three_operands", settings, split)
        super().__init__("three_operands", split, size, start, step)
        self.settings = settings

    def made_of(self) -> Any:
        return own_settings(self.settings, TaskSettings)

    def conversation(self, index: int) -> Conversation:
        random = generator(self.name, self.split, index)
        a, b, c = self._operands(random)
        s, t = random.choice(_OPERATIONS), random.choice(_OPERATIONS)
        form = _FORMS[0] if random.random() < _PLAIN_SHARE else random.choice(_FORMS[1:])
        style = random.randrange(_NUM_STYLES)
        asked = form.format(a=a, b=b, c=c, s=SIGNS[s][style], t=SIGNS[t][style])
        question = random.choice(AROUND).format(asked)
        code = form.format(a=a, b=b, c=c, s=s, t=t)
        output = evaluate(code)
        assert output is not None, code
        said = f"{form.format(a=a, b=b, c=c, s=SIGNS[s][0], t=SIGNS[t][0])} = {output}"
        with_tool = self.split == "test" or random.random() < self.settings.tool_share
        return conversation_of(question, tool_answer(code, output, said) if with_tool else said)

    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        return same_last_number(conversation, answer)

    def reward(self, conversation: Conversation, completion: Completion) -> float:
        bonus = self.settings.tool_bonus if says_what_the_tool_gave(completion.content) else 0.0
        return super().reward(conversation, completion) + bonus

    def _operands(self, random: Random) -> tuple[int, int, int]:
        while True:
            a, b, c = (random.randint(0, self.settings.max_operand) for _ in range(3))
            if is_held_out("operands", *sorted((a, b, c))) == (self.split == "test"):
                return a, b, c


def says_what_the_tool_gave(answer: Content) -> bool:
    """Whether a tool was called, gave a number, and the words behind it contain this number."""
    given: set[float] = set()
    for part in () if isinstance(answer, str) else answer:
        if part["type"] == "python_output":
            given.update(numbers_of(part["text"]))
        elif part["type"] == "text" and given.intersection(numbers_of(part["text"])):
            return True
    return False
