"""What evaluations of a run have found, as plain records: ``evaluation/STAGE/`` in its folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import setting
from nanochat_pl.evaluation.results import Difference, Summary
from nanochat_pl.report.files import build_known, finite_numbers, json_lines, optional_object

MAX_REMARK = 2000  # characters

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """What a model wrote after a prompt."""

    prompt: str = setting(doc="What the model was given.")
    text: str = setting(doc="What it wrote.")
    step: int = setting(0, "Optimizer step of the model.")


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


@dataclass(frozen=True)
class TaskResult:
    """A row of the task table; shares are between 0 and 1."""

    name: str = setting(doc="The task's name.")
    accuracy: float = setting(doc="Share of right answers.", at_least=0, at_most=1)
    n: int = setting(doc="Number of test problems.", at_least=0)
    stderr: float | None = setting(None, "Standard error of the share.", at_least=0)
    baseline: float = setting(0.0, "Share that guessing gives.", at_least=0, at_most=1)
    centered: float | None = setting(None, "Accuracy over the baseline: 0 is guessing, 1 all right.", at_most=1)
    remark: str | None = setting(None, "What has to be said with the figures.", max_length=MAX_REMARK)
    conditions: Conditions = setting(factory=Conditions, doc="How its problems were put.")


@dataclass(frozen=True)
class Comparison:
    """The differences of a suite."""

    against: str
    differences: list[Difference]


@dataclass(frozen=True)
class EvaluationRecord:
    """The figures of one evaluated bundle, by suite.

    ``figures`` are those that belong to no task; ``against`` is the other model, where they were compared.
    """

    stage: str
    suites: dict[str, list[TaskResult]] = field(default_factory=dict)
    summaries: dict[str, Summary] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    against: dict[str, str] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    chats: list[list[dict[str, Any]]] = field(default_factory=list)


def read_evaluation(folder: Path) -> EvaluationRecord:
    """Read ``evaluation/STAGE/``: what its results.json names. Answers and chats of other evaluations may lie beside.

    Raises:
        UserError: a file is damaged; named, with the line or the key.
    """
    path = folder / "results.json"
    suites = optional_object(path).get("suites", {})
    if not isinstance(suites, Mapping):
        raise UserError(f"{path}: suites: must be a group of named values.")
    found = EvaluationRecord(stage=folder.name)
    for name, suite in suites.items():
        where = f"{path}: suites.{name}"
        if isinstance(suite, list):
            found.samples.extend(build_known(Sample, item, f"{where}[{i}]") for i, item in enumerate(suite))
        elif isinstance(suite, Mapping):
            _read_suite(found, name, suite, where)
        else:
            raise UserError(f"{where}: must be a group of named values or a list.")
    names = Counter(summary.name for summary in found.summaries.values())
    for name, summary in found.summaries.items():
        if names[summary.name] > 1:  # an older evaluation gave two suites' means one name
            found.summaries[name] = replace(summary, name=f"{name}: {summary.name}")
    present = {file.name: file for file in folder.glob("answers_*.jsonl")}
    for name, tasks in found.suites.items():
        for task in tasks:
            if file := present.get(answers_file(name, task.name)):
                found.answers[task.name if name == "chat" else f"{name}: {task.name}"] = _answers(file)
    if "chat" in found.suites:
        found.chats.extend(_messages(row, where) for where, row in json_lines(folder / "chats.jsonl"))
    return found


def answers_file(suite: str, task: str) -> str:
    """The file of the answers to a task; those to the tasks that a model was trained on have the task's name alone."""
    safe = task.replace("/", "_")
    return f"answers_{safe}.jsonl" if suite == "chat" else f"answers_{suite}_{safe}.jsonl"


def _read_suite(found: EvaluationRecord, name: str, suite: Mapping[str, Any], where: str) -> None:
    if tasks := _rows(TaskResult, _with_conditions(suite, where), "tasks", where):
        found.suites[name] = tasks
    if suite.get("summary") is not None:
        found.summaries[name] = build_known(Summary, suite["summary"], f"{where}.summary")
    differences = _rows(Difference, suite, "differences", where)
    if suite.get("summary_difference") is not None:
        differences.append(build_known(Difference, suite["summary_difference"], f"{where}.summary_difference"))
    if differences:
        found.comparisons[name] = Comparison(str(suite.get("against") or "another model"), differences)
    if figures := finite_numbers(suite, where):
        found.figures[name] = figures
        if suite.get("against") and not differences:
            found.against[name] = str(suite["against"])


def _with_conditions(suite: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The suite with what is known of ``details`` in each row of ``tasks``."""
    rows = suite.get("tasks")
    if not isinstance(rows, list):
        return suite
    known = {item.name for item in fields(Conditions)}
    tasks = []
    for row in rows:
        details = row.get("details") if isinstance(row, Mapping) else None
        if isinstance(details, Mapping):
            row = {**row, "conditions": {key: details[key] for key in known & details.keys()}}
        tasks.append(row)
    return {**suite, "tasks": tasks}


def _rows(cls: type[T], suite: Mapping[str, Any], key: str, where: str) -> list[T]:
    rows = suite.get(key, [])
    if not isinstance(rows, list):
        raise UserError(f"{where}.{key}: must be a list.")
    return [build_known(cls, row, f"{where}.{key}[{i}]") for i, row in enumerate(rows)]


def _answers(path: Path) -> list[Answer]:
    """Those that have words: of some tasks there are only choices."""
    answers = [build_known(Answer, row, where) for where, row in json_lines(path)]
    return [answer for answer in answers if answer.question or answer.answer]


def _messages(row: Any, where: str) -> list[dict[str, Any]]:
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, list) or not all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages
    ):
        raise UserError(f"{where}: must hold messages, each with a role and a content.")
    return [{"role": message["role"], "parts": _parts(message.get("content"), where)} for message in messages]


def _parts(content: Any, where: str) -> list[dict[str, str]]:
    """A message's content as parts of type text, python or python_output."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(
        isinstance(part, Mapping) and isinstance(part.get("type"), str) and isinstance(part.get("text"), str)
        for part in parts
    ):
        raise UserError(f"{where}: a message's content must be text or a list of parts.")
    return [{"type": part["type"], "text": part["text"]} for part in parts]
