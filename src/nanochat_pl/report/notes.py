"""What stands beside the metrics of an evaluation: pass@k, how answers were got, errors, and what they mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nanochat_pl.evaluation.results import TaskResult
from nanochat_pl.report.evaluations import EvaluationRecord, PassAtK, conditions_of
from nanochat_pl.report.format import show
from nanochat_pl.report.read import StageRecord

_ERROR = "_stderr"


def pass_at_k(tasks: Sequence[TaskResult]) -> tuple[list[int], list[tuple[str, list[PassAtK | None]]]]:
    """The columns k of a table, powers of two and the most, and a row for each task that was answered several times."""
    several = {task.name: {each.k: each for each in conditions_of(task).pass_at_k} for task in tasks}
    several = {name: found for name, found in several.items() if len(found) > 1}
    ks = sorted({k for found in several.values() for k in found if k & (k - 1) == 0 or k == max(found)})
    return ks, [(name, [found.get(k) for k in ks]) for name, found in several.items()]


def sampling_note(tasks: Sequence[TaskResult]) -> str:
    """What the accuracy is where answers were drawn; empty where they were not."""
    conditions = [conditions_of(task) for task in tasks]
    if any((each.num_samples or 1) > 1 for each in conditions):
        return (
            "Where a problem was answered several times, its answers were drawn, and the accuracy is the mean over"
            " all of them. pass@k: the share of problems of which at least one of k answers is right."
        )
    return "Answers were drawn, one to each problem." if any(each.temperature for each in conditions) else ""


def metric_rows(evaluation: EvaluationRecord) -> Iterator[tuple[str, str, str]]:
    """The metrics that belong to no task: suite, name, value with its standard error."""
    for suite in evaluation.suites.values():
        for name, value in suite.metrics.items():
            if name.endswith(_ERROR) and name.removesuffix(_ERROR) in suite.metrics:
                continue
            error = suite.metrics.get(name + _ERROR)
            label = f"{suite.name} less that of {suite.against}" if name == "difference" and suite.against else name
            yield suite.name, label, show(value) + ("" if error is None else f" ± {show(error)}")


def bits_note(evaluation: EvaluationRecord, stage: StageRecord | None) -> str:
    """On what the bits per byte of an evaluation were measured, and on what those of its stage; empty without them."""
    suite = evaluation.suites.get("bpb")
    if suite is None or "bpb" not in suite.metrics:
        return ""
    rows = suite.metrics.get("num_rows")
    note = f"Bits per byte, of which fewer are better, on {f'{show(rows)} rows of ' if rows else ''}held-out text."
    if stage is None or stage.metric("val/bpb") is None:
        return note
    count = stage.planned("validation_rows")
    data = stage.about.get("data")
    what = "conversations" if isinstance(data, dict) and "held_out_conversations" in data else "text"
    size = "" if count is None else f"at most {show(count)} rows of "
    return (
        f"{note} The metric of stage {stage.name} is another one: the last validation of its training, on"
        f" {size}held-out {what}."
    )
