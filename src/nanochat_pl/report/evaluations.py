"""What evaluations of a run have found: ``evaluation/STAGE/`` in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build_known, setting
from nanochat_pl.evaluation.results import Summary, TaskResult
from nanochat_pl.evaluation.suites import RESULTS, SuiteResult, answers_file, read_results
from nanochat_pl.evaluation.tables import CHATS
from nanochat_pl.report.files import finite_numbers, json_lines


@dataclass(frozen=True)
class Answer:
    """One test question with the model's answer."""

    question: str = setting(doc="The question.")
    answer: str = setting(doc="The model's answer.")
    reference: str = setting("", "The right answer.")
    correct: bool | None = setting(None, "Whether the answer counts as right, where that can be said.")


@dataclass(frozen=True)
class PassAtK:
    """How likely one of k answers is right."""

    k: int = setting(doc="Answers.", at_least=1)
    value: float = setting(doc="The share of problems.", at_least=0, at_most=1)
    stderr: float = setting(doc="Its standard error.", at_least=0)


@dataclass(frozen=True)
class Conditions:
    """How the problems of a task were put; what is not known, or has no meaning for the task, is null."""

    metric: str | None = setting(None, "What is counted as right, where there are several ways.", max_length=100)
    num_shots: int | None = setting(None, "Solved examples in front of each problem.", at_least=0)
    num_fewshot: int | None = setting(None, "The same, of lm-evaluation-harness.", at_least=0)
    chat: bool | None = setting(None, "Asked as a conversation; false: as plain text.")
    num_samples: int | None = setting(None, "Answers to each problem.", at_least=1)
    temperature: float | None = setting(None, "Of the draws; 0: the most likely token each time.", at_least=0)
    top_k: int | None = setting(None, "Drawn from so many most likely tokens.", at_least=1)
    pass_at_k: list[PassAtK] = setting(factory=list, doc="For each number of answers.")

    def __str__(self) -> str:
        """In words, for a cell of a table; empty where nothing is known."""
        shots = self.num_fewshot if self.num_shots is None else self.num_shots
        said = [] if self.metric is None else [self.metric]
        said += [] if shots is None else [f"{shots} shot{'' if shots == 1 else 's'}"]
        said += [] if self.chat is None else ["as a chat" if self.chat else "as plain text"]
        if (self.num_samples or 1) > 1:
            said.append(f"mean of {self.num_samples:,} answers")
        if self.temperature:
            said.append(f"temperature {self.temperature:g}")
            said += [] if self.top_k is None else [f"top_k {self.top_k:,}"]
        elif self.temperature is None and (self.num_samples or 1) > 1:
            said.append("drawn")
        return ", ".join(said)


def conditions_of(task: TaskResult, where: str = "details") -> Conditions:
    """What the details of a task say of how its problems were put."""
    return build_known(Conditions, task.details, where)


@dataclass(frozen=True)
class EvaluationRecord:
    """What one evaluated bundle was found to be.

    Attributes:
        answers: to some tasks, by their names.
        chats: conversations of messages, each with a role and a content.
    """

    stage: str
    suites: dict[str, SuiteResult] = field(default_factory=dict)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    chats: list[list[dict[str, str]]] = field(default_factory=list)

    @property
    def of_tasks(self) -> list[SuiteResult]:
        return [suite for suite in self.suites.values() if suite.tasks]

    @property
    def summaries(self) -> list[Summary]:
        return [suite.summary for suite in self.suites.values() if suite.summary]

    def to_json(self) -> dict[str, Any]:
        """The suites as in results.json, and what lies beside them."""
        return {
            "suites": {name: suite.to_json() for name, suite in self.suites.items()},
            "answers": {task: [vars(answer) for answer in answers] for task, answers in self.answers.items()},
            "chats": self.chats,
        }


def read_evaluation(folder: Path) -> EvaluationRecord:
    """Read ``evaluation/STAGE/``: what its results.json names. Answers and chats of other evaluations may lie beside.

    Raises:
        UserError: a file is damaged; named, with the line or the key.
    """
    found = EvaluationRecord(folder.name, read_results(folder).suites)
    present = {file.name: file for file in folder.glob("answers_*.jsonl")}
    for suite in found.of_tasks:
        for number, task in enumerate(suite.tasks):
            conditions_of(task, f"{folder / RESULTS}: suites.{suite.name}.tasks[{number}].details")
            if file := present.get(answers_file(suite.name, task.name)):
                found.answers[task.name if suite.name == "chat" else f"{suite.name}: {task.name}"] = _answers(file)
    if "chat" in found.suites:
        found.chats.extend(_messages(row, where) for where, row in json_lines(folder / CHATS))
    return found


def evaluated_metrics(folder: Path) -> dict[str, float]:
    """What an evaluation has found, by name: ``evaluate/SUITE/TASK``, an accuracy; ``evaluate/SUITE/TASK/pass@K``;
    ``evaluate/SUITE/NAME`` of a summary, as CORE, or of another metric. Empty where nothing was evaluated.

    Args:
        folder: ``evaluation/STAGE`` of a run.

    Raises:
        UserError: its results are damaged.
    """
    if not (folder / RESULTS).exists():
        return {}
    found: dict[str, float] = {}
    for suite in read_results(folder).suites.values():
        found |= {
            f"evaluate/{suite.name}/{name}": value for name, value in finite_numbers(suite.metrics, folder).items()
        }
        for task in suite.tasks:
            name = f"evaluate/{suite.name}/{task.name}"
            found |= {f"{name}/pass@{each.k}": each.value for each in conditions_of(task).pass_at_k}
            found[name] = task.accuracy
        if suite.summary:
            found[f"evaluate/{suite.name}/{suite.summary.name}"] = suite.summary.value
    return found


def _answers(path: Path) -> list[Answer]:
    """Those that have words: of some tasks there are only choices."""
    answers = [build_known(Answer, row, where) for where, row in json_lines(path)]
    return [answer for answer in answers if answer.question or answer.answer]


def _messages(row: Any, where: str) -> list[dict[str, str]]:
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, list) or not all(
        isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in messages
    ):
        raise UserError(f"{where}: must hold messages, each with a role and a content, both text.")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
