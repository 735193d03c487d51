"""From the records of a run to its report: what is shown, in which order, as Markdown, as a page and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanochat_pl.common.durations import duration
from nanochat_pl.common.files import ensure_folder, write_json, write_text
from nanochat_pl.common.schema import to_plain
from nanochat_pl.comparison import Comparison
from nanochat_pl.comparison.words import COLUMNS, cells, direction, what_it_holds
from nanochat_pl.evaluation.results import Summary, TaskResult
from nanochat_pl.report import plots
from nanochat_pl.report.comparison import figures, file_name
from nanochat_pl.report.comparison_plots import dots_svg
from nanochat_pl.report.evaluations import Answer, EvaluationRecord, PassAtK, conditions_of
from nanochat_pl.report.format import (
    clean,
    compact,
    markdown_block,
    percent,
    show,
)
from nanochat_pl.report.page import page, render
from nanochat_pl.report.plots import bars_svg
from nanochat_pl.report.read import RunRecord, StageRecord, read_run

SUMMARY_COLUMNS = ("stage", "metric", "value", "standard error", "n", "baseline")
MAX_SAMPLES = 8
MAX_CHATS = 6
ANSWERS_PER_TASK = 3
_ERROR = "_stderr"


def write_report(run_dir: Path, comparisons: Sequence[Comparison] = ()) -> Path:
    """Write ``report/`` in a run folder: report.html (self-contained), report.md with its drawings, report.json.

    Stages that are missing or unfinished are named as such, and the rest is shown.

    Args:
        run_dir: of the run.
        comparisons: of its stages with those of other runs.

    Returns:
        the path of report.html.

    Raises:
        UserError: no run is there, one of its files is damaged, or the folder cannot be written.
    """
    run = read_run(run_dir)
    folder = ensure_folder(run_dir / "report")
    panels = {
        stage.name: [(f"{stage.name}-{panel.key}.svg", panel) for panel in found]
        for stage in run.stages
        if (found := plots.panels_of(stage))
    }
    drawings = {name: plots.svg(panel) for of_stage in panels.values() for name, panel in of_stage}
    bars = {}
    for evaluation in run.evaluations:
        for suite in evaluation.of_tasks:
            if suite.name.isidentifier():  # it is a part of the file's name
                name = bars[evaluation.stage, suite.name] = f"{evaluation.stage}_{suite.name}.svg"
                drawings[name] = bars_svg(evaluation.stage, suite)
    dots = {}
    for result in comparisons:
        for metric in result.metrics:
            name = dots[result.stage, metric.metric] = f"{result.stage}-{file_name(metric.metric)}-compared.svg"
            drawings[name] = dots_svg(metric, name)
    for name, drawing in drawings.items():
        write_text(folder / name, drawing)
    shown = {**_shown(run), "panels": panels, "bars": bars, "comparisons": comparisons, "dots": dots}
    markdown = _markdown(shown)
    plain = _metrics(run) | {"comparisons": {result.stage: figures(result) for result in comparisons}}
    write_json(folder / "report.json", plain, surrogates=True)
    write_text(folder / "report.md", markdown)
    write_text(folder / "report.html", page(clean(run.name), markdown, drawings))
    return folder / "report.html"


def summary_table(run_dir: Path) -> list[tuple[str, ...]]:
    """The run's metrics as rows of text, one cell for each of ``SUMMARY_COLUMNS``; empty cells where there is nothing.

    Raises:
        UserError: no run is there, or one of its files is damaged.
    """
    run = read_run(run_dir)
    rows = [row for stage in run.stages for row in _stage_rows(stage)]
    for evaluation in run.evaluations:
        rows.extend(_evaluation_rows(evaluation))
    return rows


def _evaluation_rows(evaluation: EvaluationRecord) -> Iterator[tuple[str, ...]]:
    for summary in evaluation.summaries:
        metrics = (f"{summary.value:.4f}", f"{summary.stderr:.4f}", f"{summary.n:,}", "")
        yield (evaluation.stage, clean(summary.name), *metrics)
    for suite in evaluation.of_tasks:
        for task in suite.tasks:
            metrics = (percent(task.accuracy), percent(task.stderr), f"{task.n:,}", percent(task.baseline))
            yield (evaluation.stage, f"{suite.name}: {clean(task.name)}", *metrics)


def _stage_rows(stage: StageRecord) -> Iterator[tuple[str, ...]]:
    if stage.status != "finished":
        yield (stage.name, "status", stage.status, "", "", "")
    bpb, error = stage.metric("val/bpb"), stage.metric("val/bpb_stderr")
    if bpb is not None:
        yield (stage.name, "validation bits per byte", f"{bpb:.4f}", "" if error is None else f"{error:.4f}", "", "")
    if stage.seconds is not None:
        yield (stage.name, "training time", duration(stage.seconds), "", "", "")
    if (peak := stage.column("train/peak_memory_gib").last) is not None:
        on_gpu, planned = stage.column("train/reserved_memory_gib").last is not None, stage.planned_memory_gib
        beside = f" of {planned:.2f} planned" if on_gpu and planned is not None else ""
        yield (stage.name, "peak memory", f"{peak:.2f} GiB{beside}", "", "", "")


def _shown(run: RunRecord) -> dict[str, Any]:
    """What the template shows besides the drawings."""
    stages = {stage.name: stage for stage in run.stages}
    return {
        "run": run,
        "subtitle": _subtitle(run),
        "tiles": list(_tiles(run)),
        "facts": _facts(run),
        "samples": _samples(run),
        "chats": [chat for evaluation in reversed(run.evaluations) for chat in evaluation.chats][:MAX_CHATS],
        "answers": {
            evaluation.stage: {task: _chosen(answers) for task, answers in evaluation.answers.items() if answers}
            for evaluation in run.evaluations
        },
        "notes": list(_notes(run)),
        "metrics": {evaluation.stage: list(metric_rows(evaluation)) for evaluation in run.evaluations},
        "bits_notes": {
            evaluation.stage: bits_note(evaluation, stages.get(evaluation.stage)) for evaluation in run.evaluations
        },
    }


def _notes(run: RunRecord) -> Iterator[str]:
    """What a reader must know before the metrics: what is missing, unfinished, from elsewhere, or no number."""
    for stage in run.stages:
        if stage.status == "absent":
            yield f"Stage {stage.name} was not trained."
        if stage.status == "unfinished":
            yield f"Stage {stage.name} is unfinished: what it has measured so far is shown."
        if stage.parent_run:
            yield f"Stage {stage.name} starts from run {clean(stage.parent_run)}."
        for name, series in stage.series.items():
            if series.num_not_finite:
                yield f"Stage {stage.name}: values of {clean(name)} that are not finite: {series.num_not_finite:,}."


def _total_seconds(run: RunRecord) -> float | None:
    seconds = [stage.seconds for stage in run.stages if stage.seconds is not None]
    return sum(seconds) if seconds else None


def _tiles(run: RunRecord) -> Iterator[tuple[str, str, str]]:
    """The few metrics to see first: label, value, remark."""
    for stage in run.stages:
        bpb, error = stage.metric("val/bpb"), stage.metric("val/bpb_stderr")
        if bpb is not None:
            yield (f"{stage.name}, bits per byte", f"{bpb:.3f}", "" if error is None else f"± {error:.3f}")
    for evaluation in run.evaluations:
        for summary in evaluation.summaries:
            label = f"{evaluation.stage}, {clean(summary.name)}"
            yield (label, f"{summary.value:.3f}", f"± {summary.stderr:.3f}")
    for evaluation in run.evaluations[-1:]:
        for suite in evaluation.of_tasks:
            if suite.summary is None:
                mean = sum(task.accuracy for task in suite.tasks) / len(suite.tasks)
                yield (f"{evaluation.stage}, {suite.name} tasks", percent(mean), f"mean of {len(suite.tasks)}")
    trained = [last for stage in run.stages if (last := stage.column("train/tokens").last) is not None]
    if trained:
        yield ("tokens trained on", compact(sum(trained)), "")
    total = _total_seconds(run)
    if total is not None:
        yield ("training time", duration(total), "")


def _subtitle(run: RunRecord) -> str:
    """What, when and where in one line."""
    stages = [stage for stage in reversed(run.stages) if stage.status != "absent"]
    plan = {name: item.value for stage in stages for name, item in stage.plan.items()}
    about = {key: value for stage in stages for key, value in stage.about.items()}
    parts = []
    if "depth" in plan:
        parts.append(f"depth {show(plan['depth'])}")
    if isinstance(plan.get("parameters_total"), (int, float)):
        parts.append(f"{compact(plan['parameters_total'])} parameters")
    if about.get("started"):
        parts.append(str(about["started"])[:16].replace("T", " "))  # an ISO time, to the minute
    if about.get("device"):
        parts.append(show(about["device"]))
    return " · ".join(parts)


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """What about.json says of when, where and with what: once where all stages agree, else for each stage."""
    stages = [stage for stage in run.stages if stage.about]
    facts = []
    for key in dict.fromkeys(key for stage in stages for key in stage.about):
        values = {stage.name: _fact(stage.about[key]) for stage in stages if key in stage.about}
        label = key.replace("_", " ")
        if len(set(values.values())) == 1:
            facts.append((label, next(iter(values.values()))))
        else:
            facts += [(f"{label}, {stage}", value) for stage, value in values.items()]
    return facts


def _fact(value: Any) -> str:
    """A fact as people read it. Of a tokenizer that was not compared with: its name, and the reason up to a colon."""
    if not isinstance(value, list):
        return show(value)
    rows = [
        f"{show(row.get('name'))} (skipped: {show(row['skipped']).removeprefix('skipped: ').split(':')[0]})"
        if isinstance(row, dict) and row.get("skipped")
        else show(row)
        for row in value
    ]
    return ("; " if any(isinstance(row, dict) for row in value) else ", ").join(rows)


def _samples(run: RunRecord) -> list[tuple[str, list[Any]]]:
    """Per stage what the model wrote last: the evaluation's samples, else those of the newest step in training."""
    evaluated = {item.stage: item.suites["samples"].samples for item in run.evaluations if "samples" in item.suites}
    found = []
    for stage in run.stages:
        newest = max((sample.step for sample in stage.samples), default=0)
        samples = evaluated.get(stage.name) or [sample for sample in stage.samples if sample.step == newest]
        if samples:
            found.append((stage.name, samples[:MAX_SAMPLES]))
    return found


def _chosen(answers: list[Answer]) -> list[Answer]:
    """The first few answers, a wrong one among them where there is one."""
    first = answers[:ANSWERS_PER_TASK]
    wrong = next((answer for answer in answers if not answer.correct), None)
    if wrong is not None and wrong not in first:
        first[-1] = wrong
    return first


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


def _metrics(run: RunRecord) -> dict[str, Any]:
    """Every metric of the report, in full, for programs."""
    return {
        "run": clean(run.name),
        "total_seconds": _total_seconds(run),
        "stages": {stage.name: to_plain(stage) for stage in run.stages},
        "evaluations": {item.stage: item.to_json() for item in run.evaluations},
    }


def _markdown(shown: dict[str, Any]) -> str:
    return render(
        "report.md.jinja",
        shown | {"columns": COLUMNS},
        cells=cells,
        direction=direction,
        holds=what_it_holds,
        block=markdown_block,
        percent=percent,
        duration=duration,
        metric=_metric,
        signed=lambda share: f"{100 * share:+.1f} %",  # a difference of shares in percent
        how=lambda task: str(conditions_of(task)),
        pass_at_k=pass_at_k,
        sampling_note=sampling_note,
        inputs=lambda given: ", ".join(f"{name} = {show(value)}" for name, value in given.items()),
        set_by=lambda by: by if by.startswith("inherited") else f"set by {by}",
    )


def _metric(summary: Summary) -> str:
    """A summary as people read it: with its error, interval and n."""
    interval = f"95%: {summary.low:.4f} … {summary.high:.4f}"
    return f"{summary.value:.4f} ± {summary.stderr:.4f} ({interval}), {summary.num_tasks} tasks, n {summary.n:,}"
