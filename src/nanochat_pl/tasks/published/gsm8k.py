"""GSM8K: grade-school word problems in several steps, with calls of the calculator.

Source: Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems, arXiv 2110.14168.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from nanochat_pl.common.schema import setting
from nanochat_pl.tasks.base import Content, Conversation, Part, conversation_of, reference_of, text_of
from nanochat_pl.tasks.published.base import TableSettings, TableTask
from nanochat_pl.tasks.registry import task
from nanochat_pl.tools.calculator import evaluate

_CALL = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
# What may stand between the mark and the number: a sign before or behind a currency, marks of emphasis. Bounded, or a
# long run of blanks would take minutes.
_AROUND = r"[\s*_$€£¥\\({]{0,8}"
_FINAL = re.compile(rf"####{_AROUND}([-+−]?){_AROUND}([0-9][0-9,]*\.?[0-9]*|\.[0-9]+)(?:\s?/\s?([0-9][0-9,]*))?")
_LONGEST = 100  # digits; a longer number is no answer


@dataclass(frozen=True)
class GSM8KSettings(TableSettings):
    """Word problems in several steps with the calculator: 7,473 to train on, 1,319 held out."""

    repo: str = setting("openai/gsm8k", "Data set on the hub: OWNER/NAME.")
    config: str = setting("main", "main, or socratic (solutions with a question before each step).")
    recompute: bool = setting(
        False, "Tool output as the calculator gives it (4.0) instead of the data set's text (4), in training text."
    )


@task("gsm8k", GSM8KSettings)
class GSM8K(TableTask):
    """A problem and its solution, which ends ``#### n``. An answer is right if its final number is that one."""

    task_name, columns = "gsm8k", ("question", "answer")
    settings: GSM8KSettings

    def conversation(self, index: int) -> Conversation:
        answer = self.text(index, "answer")
        if final_number(answer) is None:
            raise self.bad_row(index, "answer has no final number, #### n.")
        return conversation_of(self.text(index, "question"), solution_parts(answer, self.settings.recompute))

    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        expected = final_number(text_of(reference_of(conversation)))
        assert expected is not None, "rows without one are refused"
        return final_number(text_of(answer)) == expected


def solution_parts(answer: str, recompute: bool = False) -> list[Part]:
    """A solution as parts: ``2+3=<<2+3=5>>5 apples`` is text, a call ``2+3``, its output ``5``, and text.

    Args:
        answer: as the data set has it.
        recompute: take the calculator's result for the data set's, where it has one.
    """
    parts: list[Part] = []
    end = 0
    for call in _CALL.finditer(answer):
        parts += _text(answer[end : call.start()])
        code, output = call.groups()
        result = evaluate(code) if recompute else None
        parts.append({"type": "python", "text": code})
        parts.append({"type": "python_output", "text": output if result is None else result})
        end = call.end()
    return parts + _text(answer[end:])


def final_number(text: str) -> Fraction | None:
    """The number after the first ``####``, exact; None where there is none.

    Grouping commas, a currency, marks of emphasis and zeros behind the point make no difference: ``1,000``, ``$1000``
    and ``1000.0`` are one number.
    """
    found = _FINAL.search(text)
    if found is None or len(found[0]) > _LONGEST:
        return None
    sign, number, divisor = found.groups()
    value = Fraction(number.replace(",", "").rstrip("."))
    if divisor is not None:
        if not (below := int(divisor.replace(",", ""))):
            return None
        value /= below
    return -value if sign in ("-", "−") else value


def _text(text: str) -> list[Part]:
    return [{"type": "text", "text": text}] if text else []
