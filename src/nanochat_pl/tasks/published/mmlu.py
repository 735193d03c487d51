"""MMLU: questions of 57 subjects with four choices.

Source: Hendrycks et al. 2020, Measuring Massive Multitask Language Understanding, arXiv 2009.03300.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.common.schema import setting
from nanochat_pl.data.conversations.tables import Rows
from nanochat_pl.tasks.base import Conversation
from nanochat_pl.tasks.multiple_choice import MultipleChoice, choice_conversation
from nanochat_pl.tasks.published.base import TableSettings, TableTask
from nanochat_pl.tasks.registry import task


@dataclass(frozen=True)
class MMLUSettings(TableSettings):
    """Questions of 57 subjects with four choices: 99,842 to train on (of other exams), 14,042 held out."""

    repo: str = setting("cais/mmlu", "Data set on the hub: OWNER/NAME.")
    config: str = setting("all", "Which part of repo: the folder of its tables.")
    train_split: Literal["auxiliary_train", "dev", "validation"] = setting(
        "auxiliary_train", "Split of repo that is trained on."
    )
    test_split: Literal["test", "validation", "dev"] = setting("test", "Split of repo that is held out.")
    subjects: list[str] | None = setting(
        None,
        "Subjects by name, for instance [astronomy,virology]; null: all. auxiliary_train has none: it stays whole.",
    )


@task("mmlu", MMLUSettings)
class MMLU(TableTask, MultipleChoice):
    """A question and its choices A … D. The texts are the data set's, blanks around them included."""

    task_name, columns = "mmlu", ("question", "subject", "choices", "answer")
    choices = ("choices", None)
    baseline = 0.25  # of the published table
    settings: MMLUSettings

    def select(self, rows: Rows) -> Sequence[int]:
        wanted = self.settings.subjects
        if wanted is None:
            return super().select(rows)
        subjects = [row["subject"] for row in rows]
        there = {str(subject) for subject in subjects if subject}
        if not there:
            return super().select(rows)
        if unknown := [subject for subject in wanted if subject not in there]:
            raise UserError(
                f"{self.where}.subjects: {unknown[0]!r}: no subject here; {did_you_mean(unknown[0], there)}"
            )
        return [number for number, subject in enumerate(subjects) if subject in wanted]

    def conversation(self, index: int) -> Conversation:
        row = self.row(index)
        choices, answer = self.texts(index, "choices", row["choices"]), row["answer"]
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            raise self.bad_row(index, f"answer is {answer!r}, not the number of one of {len(choices)} choices, from 0.")
        letters = string.ascii_uppercase[: len(choices)]
        return {
            **choice_conversation(self.text(index, "question"), letters, choices, letters[answer]),
            "subject": self.text(index, "subject"),
        }
