"""What an evaluation says of a model, suite by suite: results.json, which `evaluate` writes and the report reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_object
from nanochat_pl.common.schema import build_known, is_finite_number, setting, to_plain
from nanochat_pl.evaluation.core.bundle import CORE_TASKS
from nanochat_pl.evaluation.results import (
    Difference,
    Summary,
    TaskResult,
    from_row,
    paired_difference,
    paired_summary,
    summarize,
    to_row,
)

Suite = Literal["bpb", "core", "chat", "chatcore", "samples", "harness", "tokenizer"]
CHATCORE = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")
RESULTS = "results.json"
_TASK_KEYS = {"tasks", "fewer", "summary", "differences", "summary_difference", "against"}

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """What a model wrote after a prompt."""

    prompt: str = setting(doc="What the model was given.")
    text: str = setting(doc="What it wrote.")
    step: int = setting(0, "Optimizer step of the model.")


@dataclass(frozen=True)
class SuiteResult:
    """What a suite gave.

    Attributes:
        summary: their mean, where it means something.
        fewer: what tasks gave of fewer problems (``limit``) than ``tasks`` is of.
        against: the model that it was compared with.
        differences: this model less the other, on the same problems, for each task that both were given.
        summary_difference: the same of the mean.
        plain: what belongs to no task: metrics by name (bpb), a table (tokenizer), or samples.
    """

    name: str
    tasks: list[TaskResult] = field(default_factory=list)
    summary: Summary | None = None
    fewer: list[TaskResult] = field(default_factory=list)
    against: str = ""
    differences: list[Difference] = field(default_factory=list)
    summary_difference: Difference | None = None
    plain: Any = None

    @property
    def metrics(self) -> dict[str, float]:
        """The finite numbers that belong to no task."""
        named = self.plain if isinstance(self.plain, Mapping) else {}
        return {key: value for key, value in named.items() if is_finite_number(value)}

    @property
    def samples(self) -> list[Sample]:
        """The samples of the suite of that name."""
        return [build_known(Sample, row, "samples") for row in self.plain] if isinstance(self.plain, list) else []

    @property
    def remark(self) -> str | None:
        """What has to be said with the mean of its tasks."""
        return "; ".join(f"{task.name}: {task.remark}" for task in self.tasks if task.remark) or None

    def to_json(self) -> Any:
        if isinstance(self.plain, list):
            return self.plain
        value: dict[str, Any] = dict(self.plain or {})
        for key, tasks in (("tasks", self.tasks), ("fewer", self.fewer)):
            if tasks:
                value[key] = [to_row(task) for task in tasks]
        if self.summary:
            value["summary"] = {**to_plain(self.summary), "remark": self.remark}
        if self.against:
            value["against"] = self.against
        if self.differences:
            value["differences"] = to_plain(self.differences)
        if self.summary_difference:
            value["summary_difference"] = to_plain(self.summary_difference)
        return value

    @staticmethod
    def from_json(name: str, value: Any, where: str) -> SuiteResult:
        """The inverse of :meth:`to_json`, of data that anybody may have written.

        Raises:
            UserError: it says something else; named with ``where`` and the key.
        """
        if isinstance(value, list):
            for number, row in enumerate(value):
                build_known(Sample, row, f"{where}[{number}]")
            return SuiteResult(name, plain=value)
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: must be a group of named values or a list.")
        rows = {key: _list(value, key, where) for key in ("tasks", "fewer", "differences")}
        summary = _optional(Summary, value, "summary", where)
        if summary and summary.name == "mean of the tasks":  # earlier versions did not say of which suite
            summary = replace(summary, name=f"{name}: {summary.name}")
        return SuiteResult(
            name,
            [from_row(row, f"{where}.tasks[{n}]") for n, row in enumerate(rows["tasks"])],
            summary,
            [from_row(row, f"{where}.fewer[{n}]") for n, row in enumerate(rows["fewer"])],
            str(value.get("against") or ""),
            [build_known(Difference, row, f"{where}.differences[{n}]") for n, row in enumerate(rows["differences"])],
            _optional(Difference, value, "summary_difference", where),
            {key: each for key, each in value.items() if key not in _TASK_KEYS},
        )

    def compared_with(self, other: SuiteResult, name: str) -> SuiteResult:
        """This one with the differences from another model, called ``name``; as it is where nothing is common.

        Bits per byte are of rows that are cut by each model's own tokens, so there are no pairs: the error is that of
        two independent metrics, and too large rather than too small.

        Raises:
            UserError: a task of both has no common problem.
        """
        a, b = self.metrics, other.metrics
        if "bpb" in a and "bpb" in b:
            found = {"difference": a["bpb"] - b["bpb"]}
            if "bpb_stderr" in a and "bpb_stderr" in b:
                found["difference_stderr"] = math.hypot(a["bpb_stderr"], b["bpb_stderr"])
            return replace(self, against=name, plain={**self.plain, **found})
        theirs = {task.name: task for task in other.tasks}
        common = [task for task in self.tasks if task.name in theirs]
        if not common:
            return self
        mean = summary_name(self.name, [task.name for task in common])
        return replace(
            self,
            against=name,
            differences=[paired_difference(task, theirs[task.name]) for task in common],
            summary_difference=paired_summary(mean, self.tasks, other.tasks) if mean else None,
        )


@dataclass(frozen=True)
class Evaluation:
    """What results.json says: of which model and by which settings it is, and the suites."""

    origin: dict[str, Any] = field(default_factory=dict)
    suites: dict[str, SuiteResult] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**self.origin, "suites": {name: suite.to_json() for name, suite in self.suites.items()}}


def read_results(folder: Path) -> Evaluation:
    """Read results.json of a folder; one that is not there says nothing.

    Raises:
        UserError: the file is damaged; named, with the key.
    """
    path = folder / RESULTS
    if not path.exists():
        return Evaluation()
    value = read_object(path, surrogates=True)
    suites = value.pop("suites", {})
    if not isinstance(suites, Mapping):
        raise UserError(f"{path}: suites: must be a group of named values.")
    return Evaluation(
        value, {name: SuiteResult.from_json(name, suite, f"{path}: suites.{name}") for name, suite in suites.items()}
    )


def suite_of(name: str, tasks: Sequence[TaskResult], plain: Any = None) -> SuiteResult:
    """What a suite gave, with the mean of its tasks where it has one."""
    mean = summary_name(name, [task.name for task in tasks])
    return SuiteResult(name, list(tasks), summarize(mean, tasks) if mean else None, plain=plain)


def summary_name(suite: str, tasks: Sequence[str]) -> str | None:
    """What the mean of these tasks' centered accuracies is called; None: it means nothing."""
    if not tasks or suite not in ("core", "chat", "chatcore"):
        return None
    if suite == "core":
        ours, number = len({*tasks} & {*CORE_TASKS}), len({*tasks})
        besides = f" and {number - ours} others" if number > ours else ""
        return "CORE" if {*tasks} == {*CORE_TASKS} else f"CORE ({ours} of {len(CORE_TASKS)} tasks{besides})"
    if suite == "chat" or not {*tasks} & {*CHATCORE}:
        return f"{suite}: mean of the tasks"
    others = sorted({*tasks} - {*CHATCORE})
    missing = len({*CHATCORE} - {*tasks})
    remarks = [f"{len(CHATCORE) - missing} of {len(CHATCORE)} tasks"] if missing else []
    remarks += [f"with {', '.join(others)}"] if others else []
    return f"ChatCORE ({', '.join(remarks)})" if remarks else "ChatCORE"


def require_chat_model(stage: StageInfo, path: Path, suite: str) -> None:
    """Refuse to ask a model of a stage that has seen no conversation."""
    if suite in ("chat", "chatcore") and not stage.has_seen_conversations:
        raise UserError(
            f"{suite}: {path}: is a base model, which has seen no conversation.",
            "Measure suites=[bpb,core,samples] of it, or train stage=sft first.",
        )


def answers_file(suite: str, task: str) -> str:
    """The file of the answers to a task; those to the tasks that a model was trained on have the task's name alone."""
    safe = task.replace("/", "_")
    return f"answers_{safe}.jsonl" if suite == "chat" else f"answers_{suite}_{safe}.jsonl"


def _list(value: Mapping[str, Any], key: str, where: str) -> list[Any]:
    rows = value.get(key) or []
    if not isinstance(rows, list):
        raise UserError(f"{where}.{key}: must be a list.")
    return rows


def _optional(cls: type[T], value: Mapping[str, Any], key: str, where: str) -> T | None:
    return None if value.get(key) is None else build_known(cls, value[key], f"{where}.{key}")
