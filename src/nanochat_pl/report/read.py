"""The files of a run folder, read into plain records. The report knows a run by these files alone.

What is not there is left out. What is there and cannot be understood is a :class:`UserError` that names the file: a
report that quietly left out half of the figures would be worse than none. One exception: a last line without a line
end is what a killed process leaves behind, and is dropped.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_json
from nanochat_pl.common.run_folder import STAGES, Status
from nanochat_pl.common.settings import build, setting
from nanochat_pl.report.text import show

# The stages that a whole chain has; a report says so where one of them was not trained.
EXPECTED_STAGES = ("tokenizer", "base", "sft")
MAX_FILE_BYTES = 512 * 2**20

T = TypeVar("T")


@dataclass(frozen=True)
class Series:
    """One column of metrics.csv: the finite values, at their optimizer steps in ascending order."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    num_not_finite: int = 0

    @property
    def last(self) -> float | None:
        """The last value; None where nothing was measured."""
        return self.values[-1] if self.values else None


@dataclass(frozen=True)
class PlanValue:
    """One value of the plan with its reason."""

    name: str
    value: Any
    formula: str = ""
    inputs: str = ""
    overridden_by: str = ""


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
    correct: bool = setting(False, "Whether the answer counts as right.")


@dataclass(frozen=True)
class TaskResult:
    """A row of the task table; shares are between 0 and 1."""

    name: str = setting(doc="The task's name.")
    accuracy: float = setting(doc="Share of right answers.", at_least=0, at_most=1)
    n: int = setting(doc="Number of test problems.", at_least=0)
    stderr: float | None = setting(None, "Standard error of the share.", at_least=0)
    baseline: float = setting(0.0, "Share that guessing gives.", at_least=0, at_most=1)


@dataclass(frozen=True)
class StageRecord:
    """All that a stage's folder says; nothing but the name where the status is ``absent``.

    ``parent_run`` is the run whose earlier stages this one starts from, where that is another run.
    """

    name: str
    status: Status
    parent_run: str = ""
    step: int | None = None
    seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    plan: list[PlanValue] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def column(self, name: str) -> Series:
        """A column of metrics.csv; empty where it was not written."""
        return self.series.get(name, Series())

    def figure(self, name: str) -> float | None:
        """The last value of a column, else what finished.json says."""
        last = self.column(name).last
        return self.metrics.get(name) if last is None else last


@dataclass(frozen=True)
class EvaluationRecord:
    """The figures of one evaluated bundle."""

    stage: str
    suites: dict[str, list[TaskResult]] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    chats: list[list[dict[str, Any]]] = field(default_factory=list)


@dataclass(frozen=True)
class RunRecord:
    """A run: its stages in the order of training, and its evaluations in the same order."""

    name: str
    stages: list[StageRecord]
    evaluations: list[EvaluationRecord]


def read_run(run_dir: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: there is no such folder, no stage in it, or one of its files is damaged (named, with the line).
    """
    present = [stage for stage in STAGES if (run_dir / stage).is_dir()]
    if not present:
        problem = "holds no stage of a run" if run_dir.is_dir() else "there is no such run"
        raise UserError(f"{run_dir}: {problem}.", fix="`nanochat-pl runs` lists the runs that are there.")
    shown = [stage for stage in STAGES if stage in present or stage in EXPECTED_STAGES]
    stages = [_read_stage(run_dir / stage) for stage in shown]
    folders = [run_dir / "evaluation" / stage for stage in STAGES]
    evaluations = [_read_evaluation(folder) for folder in folders if folder.is_dir()]
    return RunRecord(name=run_dir.resolve().name, stages=stages, evaluations=evaluations)


def _read_stage(folder: Path) -> StageRecord:
    if not folder.is_dir():
        return StageRecord(name=folder.name, status="absent")
    finished = _optional_object(folder / "finished.json")
    series = _read_metrics(folder / "metrics.csv")
    last_step = max((column.steps[-1] for column in series.values() if column.steps), default=None)
    metrics = finished.get("metrics") or {}
    numbers = _finite_numbers(metrics, folder / "finished.json")
    return StageRecord(
        name=folder.name,
        status="finished" if (folder / "finished.json").exists() else "unfinished",
        parent_run=str(_optional_object(folder / "parent.json").get("run", "")),
        step=_number(finished, "step", folder / "finished.json", whole=True) if "step" in finished else last_step,
        seconds=_number(finished, "seconds", folder / "finished.json"),
        metrics=numbers,
        plan=list(_plan_values(_optional_object(folder / "plan.json"))),
        about=_about(folder, metrics),
        series=series,
        samples=_read_samples(folder / "samples.jsonl"),
    )


def _about(folder: Path, metrics: Any) -> dict[str, Any]:
    """When, where and with what: about.json, the data that the bundle names, and what was measured in words."""
    data = _optional_object(folder / "bundle" / "stage.json").get("data")
    words = {key: value for key, value in metrics.items() if not isinstance(value, (int, float))}
    return {**_optional_object(folder / "about.json"), **({"data": data} if data else {}), **words}


def _read_evaluation(folder: Path) -> EvaluationRecord:
    path = folder / "results.json"
    suites = _optional_object(path).get("suites", {})
    if not isinstance(suites, Mapping):
        raise UserError(f"{path}: suites: must be a group of named values.")
    tasks: dict[str, list[TaskResult]] = {}
    figures: dict[str, dict[str, float]] = {}
    samples: list[Sample] = []
    for name, suite in suites.items():
        if isinstance(suite, list):
            samples += [_build_known(Sample, item, f"{path}: suites.{name}[{i}]") for i, item in enumerate(suite)]
        elif isinstance(suite, Mapping):
            rows = suite.get("tasks", [])
            if not isinstance(rows, list):
                raise UserError(f"{path}: suites.{name}.tasks: must be a list.")
            where = f"{path}: suites.{name}.tasks"
            tasks[name] = [_build_known(TaskResult, row, f"{where}[{i}]") for i, row in enumerate(rows)]
            figures[name] = _finite_numbers(suite, path)
        else:
            raise UserError(f"{path}: suites.{name}: must be a group of named values or a list.")
    return EvaluationRecord(
        stage=folder.name,
        suites={name: rows for name, rows in tasks.items() if rows},
        figures={name: values for name, values in figures.items() if values},
        samples=samples,
        answers={
            file.stem.removeprefix("answers_"): [_build_known(Answer, row, where) for where, row in _json_lines(file)]
            for file in sorted(folder.glob("answers_*.jsonl"))
        },
        chats=[_messages(row, where) for where, row in _json_lines(folder / "chats.jsonl")],
    )


def _read_metrics(path: Path) -> dict[str, Series]:
    """The columns of a wide CSV file: ``step`` first, empty cells where nothing was measured.

    A step that was written twice (a run that was killed and resumed) keeps what was written last.
    """
    rows = csv.reader(_lines(path))
    try:
        header = next(rows, [])
        columns: dict[str, dict[int, float]] = {name: {} for name in header[1:]}
        if header and header[0] != "step":
            raise UserError(f"{path}: line 1: the first column must be step, not {header[0]!r}.")
        for row in rows:
            if len(row) != len(header):
                raise UserError(f"{path}: line {rows.line_num}: {len(row)} cells, and {len(header)} columns.")
            step = int(row[0])
            for name, cell in zip(header[1:], row[1:], strict=True):
                if cell:
                    columns[name][step] = float(cell)
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: line {rows.line_num}: {error}.") from error
    return {name: _series(cells) for name, cells in columns.items()}


def _series(cells: dict[int, float]) -> Series:
    finite = sorted((step, value) for step, value in cells.items() if math.isfinite(value))
    return Series(
        steps=tuple(step for step, _ in finite),
        values=tuple(value for _, value in finite),
        num_not_finite=len(cells) - len(finite),
    )


def _plan_values(node: Any, prefix: str = "") -> Iterator[PlanValue]:
    """Every value of a plan, also of nested groups: a leaf is a scalar, or a mapping with ``value`` in it."""
    if isinstance(node, Mapping) and "value" in node:
        inputs = node.get("inputs") or {}
        shown = (
            ", ".join(f"{k} = {show(v)}" for k, v in inputs.items()) if isinstance(inputs, Mapping) else show(inputs)
        )
        formula, overridden = str(node.get("formula") or ""), str(node.get("overridden_by") or "")
        yield PlanValue(prefix, node["value"], formula, shown, overridden)
    elif isinstance(node, Mapping):
        for key, item in node.items():
            yield from _plan_values(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield PlanValue(prefix, node)


def _read_samples(path: Path) -> list[Sample]:
    return [_build_known(Sample, row, where) for where, row in _json_lines(path)]


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


def _build_known(cls: type[T], row: Any, where: str) -> T:
    """A record of the keys that it knows: files of later versions may say more."""
    if isinstance(row, Mapping):
        row = {item.name: row[item.name] for item in fields(cls) if item.name in row}  # type: ignore[arg-type]
    return build(cls, row, where)


def _number(values: Mapping[str, Any], key: str, path: Path, whole: bool = False) -> Any:
    value = values.get(key)
    if value is None:
        return None
    if not _is_finite_number(value) or (whole and not isinstance(value, int)):
        raise UserError(f"{path}: {key}={value!r}: must be a {'whole ' if whole else ''}number.")
    return value


def _finite_numbers(values: Any, path: Path) -> dict[str, float]:
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: {values!r}: must be a group of named numbers.")
    return {key: value for key, value in values.items() if _is_finite_number(value)}


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _optional_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value = read_json(path, surrogates=True)
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(value).__name__}.")
    return value


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line's place, for messages, and its value."""
    for number, line in enumerate(_lines(path), start=1):
        try:
            yield f"{path}: line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number}: is no valid JSON: {error}") from error


def _lines(path: Path) -> list[str]:
    """The whole lines of a UTF-8 file; none where there is no such file."""
    if not path.exists():
        return []
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UserError(f"{path}: {size:,} bytes, more than the {MAX_FILE_BYTES:,} that such a file may have.")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no UTF-8 text: {error}") from error
    # Not splitlines: a JSON text may hold U+2028 as it is.
    return text.split("\n")[:-1]
