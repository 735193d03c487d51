"""Multiple choice about documented functions of the standard library: what one does, and which one does something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import setting
from nanochat_pl.tasks.base import Conversation, Split, TaskSettings, generator, limits
from nanochat_pl.tasks.context import MIXTURE, TaskContext
from nanochat_pl.tasks.multiple_choice import MultipleChoice, choice_conversation
from nanochat_pl.tasks.registry import task
from nanochat_pl.tasks.synthetic.documentation import documented_functions, summary_held_out

_LETTERS = ("A", "B", "C", "D")
_WHAT = (
    "What does `{name}` do?",
    "What is `{name}` for?",
    "Which sentence describes `{name}`?",
    "What is said of `{name}` in its documentation?",
)
_WHICH = (
    "Which function does this: {summary}",
    "Of which function is this the documentation: {summary}",
    "What is described here: {summary}",
)


@dataclass(frozen=True)
class DocumentationChoiceSettings(TaskSettings):
    """Which of four sentences describes a function of the standard library, or which of four functions a sentence."""

    size: int = setting(6_000, "Training conversations.", at_least=1)
    test_size: int = setting(300, "Held-out questions, or as many as there are: two for each function.", at_least=1)
    max_chars: int = setting(80, "Longest summary line, in characters.", at_least=20)


@task("documentation_choice", DocumentationChoiceSettings)
class DocumentationChoice(MultipleChoice):
    """Four choices, one of them right.

    Held out are summary lines with the functions they belong to: in training they are neither asked about nor among
    the choices, and in the test part the wrong choices are held out too. The task ``documentation`` leaves them out.
    """

    baseline = 1 / len(_LETTERS)

    def __init__(
        self,
        settings: DocumentationChoiceSettings,
        split: Split,
        functions: Sequence[tuple[str, str]],
        where: str = MIXTURE,
    ) -> None:
        """
        Args:
            settings: of this task.
            split: which functions.
            functions: (qualified name, summary line), as ``documented_functions`` gives them.
            where: the group that the task is a key of, for messages.

        Raises:
            UserError: there are too few functions for four choices.
        """
        self.functions = sorted(pair for pair in functions if summary_held_out(pair[1]) == (split == "test"))
        generator("documentation_choice", split).shuffle(self.functions)
        if len({summary for _, summary in self.functions}) < len(_LETTERS):
            raise UserError(
                f"{where}.documentation_choice: there are not {len(_LETTERS)} functions for its {split} part.",
                f"Allow longer ones, {where}.documentation_choice.max_chars, or leave the task out.",
            )
        start, size, step = limits("documentation_choice", settings, split, None, 2 * len(self.functions), where)
        super().__init__("documentation_choice", split, size, start, step)

    @classmethod
    def from_settings(
        cls, settings: DocumentationChoiceSettings, split: Split, context: TaskContext
    ) -> DocumentationChoice:
        functions = documented_functions(context.corpus.stdlib_docstrings, settings.max_chars)
        return cls(settings, split, functions, context.where)

    def made_of(self) -> Any:
        return self.functions

    def conversation(self, index: int) -> Conversation:
        random = generator(self.name, self.split, index)
        times_round, place = divmod(index, len(self.functions))
        shown = self._choices(random, place)
        random.shuffle(shown)
        name, summary = right = self.functions[place]
        asks_what = (place + times_round) % 2 == 0
        question = (
            random.choice(_WHAT).format(name=name) if asks_what else random.choice(_WHICH).format(summary=summary)
        )
        choices = [summary if asks_what else name for name, summary in shown]
        return choice_conversation(question, _LETTERS, choices, _LETTERS[shown.index(right)])

    def _choices(self, random: Random, right: int) -> list[tuple[str, str]]:
        """The right function and three others, all with different summary lines."""
        chosen = {self.functions[right][1]: self.functions[right]}
        while len(chosen) < len(_LETTERS):
            other = random.choice(self.functions)
            chosen.setdefault(other[1], other)
        return list(chosen.values())
