"""ARC: science questions of schools, in an easy and a hard part.

Source: Clark et al. 2018, Think you have Solved Question Answering? Try ARC, arXiv 1803.05457.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Literal

from nanochat_pl.common.schema import setting
from nanochat_pl.tasks.base import Conversation
from nanochat_pl.tasks.multiple_choice import MultipleChoice, choice_conversation
from nanochat_pl.tasks.published.base import TableSettings, TableTask
from nanochat_pl.tasks.registry import task

_LABELS = frozenset(string.ascii_letters + string.digits)


@dataclass(frozen=True)
class ARCEasySettings(TableSettings):
    """Science questions of schools, the easy ones: 2,251 to train on, 2,376 held out."""

    repo: str = setting("allenai/ai2_arc", "Data set on the hub: OWNER/NAME.")
    config: str = setting("ARC-Easy", "Which part of repo: the folder of its tables.")
    test_split: Literal["test", "validation"] = setting("test", "Split of repo that is held out.")


@dataclass(frozen=True)
class ARCChallengeSettings(ARCEasySettings):
    """Science questions of schools, the hard ones: 1,119 to train on, 1,172 held out."""

    config: str = setting("ARC-Challenge", "Which part of repo: the folder of its tables.")


@task("arc_easy", ARCEasySettings)
class ARCEasy(TableTask, MultipleChoice):
    """A question and three to five choices. Their letters are the data set's: some questions have digits, 1 … 4."""

    task_name, columns = "arc_easy", ("question", "choices", "answerKey")
    choices = ("choices", "text")
    baseline = 0.25  # of the published table

    def conversation(self, index: int) -> Conversation:
        given, answer = self.row(index)["choices"], self.text(index, "answerKey")
        given = given if isinstance(given, dict) else {}
        choices, letters = (self.texts(index, f"choices.{key}", given.get(key)) for key in ("text", "label"))
        if len(choices) != len(letters) or len(set(letters)) != len(letters):
            raise self.bad_row(index, f"{len(choices)} choices have the labels {', '.join(letters)}.")
        # An answer is chosen by the logit of its label: it has to be one token, as these are of any tokenizer.
        if odd := [letter for letter in letters if letter not in _LABELS]:
            raise self.bad_row(index, f"the label {odd[0]!r} is not one letter, A … Z, or digit.")
        if answer not in letters:
            raise self.bad_row(index, f"answerKey is {answer!r}, none of {', '.join(letters)}.")
        return choice_conversation(self.text(index, "question"), letters, choices, answer)


@task("arc_challenge", ARCChallengeSettings)
class ARCChallenge(ARCEasy):
    """The hard questions."""

    task_name = "arc_challenge"
