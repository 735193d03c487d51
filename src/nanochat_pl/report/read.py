"""The files of a run folder, read into plain records. The report knows a run by these files alone.

What is not there is left out. What is there and cannot be understood is a :class:`UserError` that names the file: a
report that quietly left out half of the metrics would be worse than none. One exception: a last line without a line
end is what a killed process leaves behind, and is dropped.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.run_dir import STAGES, Status, stage_order, stages_in
from nanochat_pl.common.schema import build_known, is_finite_number
from nanochat_pl.evaluation.suites import Sample
from nanochat_pl.planning import Derived, Plan
from nanochat_pl.report.evaluations import EvaluationRecord, read_evaluation
from nanochat_pl.report.files import finite_numbers, json_lines, lines, number, optional_object

# The stages that a whole chain has; a report says so where one of them was not trained.
EXPECTED_STAGES = ("tokenizer", "base", "sft")
_DAMAGED = "Bring the file back from a copy; or move it away, and the report is made without what it says."


@dataclass(frozen=True)
class Series:
    """One column of metrics.csv: the finite values, at their optimizer steps in ascending order."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    num_not_finite: int = 0

    @property
    def last(self) -> float | None:
        return self.values[-1] if self.values else None


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
    plan: dict[str, Derived] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def column(self, name: str) -> Series:
        return self.series.get(name, Series())

    def planned(self, name: str) -> float | None:
        """A number of the plan, as ``validation_rows``: how many were to be read; the text may have fewer."""
        return self.plan[name].value if name in self.plan and is_finite_number(self.plan[name].value) else None

    @property
    def planned_memory_gib(self) -> float | None:
        """What the plan said that a step takes of the device's memory, in GiB."""
        peak = self.planned("step_peak_bytes")
        return None if peak is None else peak / 2**30

    def metric(self, name: str) -> float | None:
        """The last value of a column, else what finished.json says."""
        last = self.column(name).last
        return self.metrics.get(name) if last is None else last


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
    present = stages_in(run_dir)
    if not present:
        problem = "holds no stage of a run" if run_dir.is_dir() else "there is no such run"
        raise UserError(f"{run_dir}: {problem}.", fix="`nanochat-pl runs` lists the runs that are there.")
    order = sorted({*STAGES, *present}, key=lambda stage: stage_order(run_dir / stage))
    shown = [stage for stage in order if stage in present or stage in EXPECTED_STAGES]
    folders = [run_dir / "evaluation" / stage for stage in order]
    try:
        stages = [read_stage(run_dir / stage) for stage in shown]
        evaluations = [read_evaluation(folder) for folder in folders if folder.is_dir()]
    except UserError as error:
        raise UserError(error.problems, error.fix or _DAMAGED) from error
    return RunRecord(name=run_dir.resolve().name, stages=stages, evaluations=evaluations)


def read_stage(folder: Path) -> StageRecord:
    """Read a stage's folder. Raises :class:`UserError` where one of its files is damaged (named, with the line)."""
    if not folder.is_dir():
        return StageRecord(name=folder.name, status="absent")
    finished = optional_object(folder / "finished.json")
    series = read_curves(folder / "metrics.csv")
    last_step = max((column.steps[-1] for column in series.values() if column.steps), default=None)
    metrics = finished.get("metrics") or {}
    numbers = finite_numbers(metrics, folder / "finished.json")
    return StageRecord(
        name=folder.name,
        status="finished" if (folder / "finished.json").exists() else "unfinished",
        parent_run=str(optional_object(folder / "parent.json").get("run", "")),
        step=number(finished, "step", folder / "finished.json", whole=True) if "step" in finished else last_step,
        seconds=number(finished, "seconds", folder / "finished.json"),
        metrics=numbers,
        plan=Plan.from_plain(optional_object(folder / "plan.json"), str(folder / "plan.json")).values,
        about=_about(folder, metrics),
        series=series,
        samples=[build_known(Sample, row, where) for where, row in json_lines(folder / "samples.jsonl")],
    )


def _about(folder: Path, metrics: Any) -> dict[str, Any]:
    """When, where and with what: about.json, the data that the bundle names, and what was measured in words."""
    data = _with_epochs(optional_object(folder / "bundle" / "stage.json").get("data"))
    if isinstance(data, Mapping) and isinstance(sources := data.get("sources"), Mapping):
        data = {**data, "sources": {name: _with_epochs(source) for name, source in sources.items()}}
    words = {key: value for key, value in metrics.items() if not isinstance(value, (int, float))}
    return {**optional_object(folder / "about.json"), **({"data": data} if data else {}), **words}


def _with_epochs(data: Any) -> Any:
    """Data whose packing says how often its tokens were read. In the file it is how many passes were begun to fill the
    packer, of which a short stage takes little."""
    if not isinstance(data, Mapping) or not isinstance(packing := data.get("packing"), Mapping):
        return data
    placed, tokens = (
        finite_numbers(each, "").get(key) for each, key in ((packing, "placed_tokens"), (data, "train_tokens"))
    )
    packing = {key: value for key, value in packing.items() if key != "epochs"}
    if placed is not None and tokens:
        packing["epochs"] = float(f"{placed / tokens:.2g}")
    return {**data, "packing": packing}


def read_curves(path: Path) -> dict[str, Series]:
    """The columns of a wide CSV file: ``step`` first, empty cells where nothing was measured.

    A step that was written twice (a run that was killed and resumed) keeps what was written last.
    """
    rows = csv.reader(lines(path))
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
