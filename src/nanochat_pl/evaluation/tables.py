"""What `evaluate` shows and writes of its results: tables on the terminal, a CSV for each suite, answers for people."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.common.console import print_table, rank_zero_print
from nanochat_pl.common.files import write_text
from nanochat_pl.common.schema import is_finite_number
from nanochat_pl.evaluation.results import Difference, TaskResult
from nanochat_pl.evaluation.suites import Suite, SuiteResult, answers_file, summary_name
from nanochat_pl.tokenizer.comparison import print_comparison

CHATS = "chats.jsonl"
DIFFERENCES = "differences.csv"
PUBLISHED = "core_published.csv"  # CORE in the format of the published results
NUM_CHATS = 6


def show_suite(found: SuiteResult) -> None:
    """Print a suite's metrics."""
    if "bpb" in found.metrics:
        rank_zero_print(f"bits per byte: {found.metrics['bpb']:.4f}{_stderr(found.metrics, 'bpb_stderr')}")
    if found.name == "tokenizer":
        table = found.plain["table"]
        print_comparison([*table[0]], [[*row.values()] for row in table], found.plain["skipped"], title="tokenizer")
    if found.tasks:
        columns = ("task", "accuracy %", "stderr", "of", "guessing %", "centered %")
        print_table(columns, [_shown(task) for task in found.tasks], title=found.name)
    for task in found.tasks:
        for line in _remarks(task):
            rank_zero_print(f"{task.name}: {line}")
    if summary := found.summary:
        metrics = (summary.value, summary.stderr, summary.low, summary.high)
        value, stderr, low, high = (f"{round(metric, 4) + 0.0:.4f}" for metric in metrics)  # + 0.0: no minus before 0
        remark = f" [{found.remark}]" if found.remark else ""
        size = f"{summary.num_tasks} task{'s' if summary.num_tasks > 1 else ''}, n {summary.n:,}"
        rank_zero_print(f"{summary.name}: {value} ± {stderr} (95%: {low} … {high}), {size}{remark}")


def show_own_validation(stage: StageInfo) -> None:
    """Print what the stage's training has measured of itself, where an evaluation had nothing to judge."""
    metrics = {name: value for name, value in stage.metrics.items() if is_finite_number(value)}
    if "val/bpb" in metrics:
        what = "conversations" if stage.has_seen_conversations else "text"
        rank_zero_print(
            f"bits per byte of held-out {what}, at the end of stage {stage.stage}:"
            f" {metrics['val/bpb']:.4f}{_stderr(metrics, 'val/bpb_stderr')}"
        )
    rank_zero_print("suites=[bpb] measures the model on held-out text; what it writes is in the report.")


def show_differences(name: str, suites: Sequence[SuiteResult]) -> None:
    """Print by how much the model is better than another."""
    for suite in suites:
        if "difference" in suite.metrics:
            metric = f"{suite.metrics['difference']:+.4f}{_stderr(suite.metrics, 'difference_stderr')}"
            rank_zero_print(f"bits per byte: {metric} against {name}; the rows are not the same.")
    if rows := [(suite.name, *_shown_difference(each)) for suite in suites for each in _differences(suite)]:
        columns = ("suite", "task", "difference %", "stderr", "95% from", "to", "pairs")
        print_table(columns, rows, title=f"this model minus {name}, on the same problems")


def _stderr(metrics: Mapping[str, float], name: str) -> str:
    """A standard error behind its metric; one row alone has none."""
    error = metrics.get(name, math.nan)
    return f" ± {error:.4f}" if math.isfinite(error) else ""


def write_suite(folder: Path, found: SuiteResult) -> None:
    """Write a suite's CSV, its answers, and CORE's table in the published format."""
    if found.name == "tokenizer" and (table := found.plain["table"]):
        _write_csv(folder / "tokenizer.csv", [*table[0]], [[*row.values()] for row in table])
    if not found.tasks:
        return
    columns = ("task", "accuracy", "stderr", "n", "baseline", "centered", "remark")
    _write_csv(folder / f"{found.name}.csv", columns, map(_csv_row, found.tasks))
    if found.name == "core":
        write_text(folder / PUBLISHED, core_table(found.tasks))
    for task in found.tasks:
        if task.answers:
            rows = [{"question": "", "answer": "", **row} for row in task.answers]  # some have no words of their own
            _write_lines(folder / answers_file(found.name, task.name), rows)
    if found.name == "chat":
        _write_lines(folder / CHATS, _first_chats(found.tasks))


def write_differences(folder: Path, suites: Iterable[SuiteResult]) -> None:
    metrics = ("difference", "stderr", "low", "high", "n")
    rows = [
        (suite.name, each.name, *(getattr(each, key) for key in metrics), suite.against)
        for suite in suites
        for each in _differences(suite)
    ]
    if rows:
        _write_csv(folder / DIFFERENCES, ("suite", "task", *metrics, "against"), rows)


def remove_tables(folder: Path, before: Iterable[SuiteResult], now: Iterable[SuiteResult]) -> None:
    """Remove what was written for the suites of an earlier results.json and is not written for those of today's."""
    kept = {name for suite in now for name in _files_of(suite)}
    earlier = [suite for suite in before if suite.name in get_args(Suite)]  # the file may have come from elsewhere
    for name in {name for suite in earlier for name in _files_of(suite)} - kept:
        (folder / name).unlink(missing_ok=True)


def _files_of(suite: SuiteResult) -> Iterator[str]:
    """The files that :func:`write_suite` and :func:`write_differences` write."""
    if suite.tasks or suite.name == "tokenizer":
        yield f"{suite.name}.csv"
    if suite.tasks and suite.name in ("core", "chat"):
        yield PUBLISHED if suite.name == "core" else CHATS
    yield from (answers_file(suite.name, task.name) for task in suite.tasks)
    if _differences(suite):
        yield DIFFERENCES


def core_table(results: Sequence[TaskResult]) -> str:
    """The published file: a line a task, accuracy and centered accuracy to six digits, then their mean."""
    mean = sum(result.centered for result in results) / len(results)
    rows = [("Task", "Accuracy", "Centered")]
    rows += [(result.name, f"{result.accuracy:.6f}", f"{result.centered:.6f}") for result in results]
    rows.append((str(summary_name("core", [result.name for result in results])), "", f"{mean:.6f}"))
    return "".join(f"{task:<35}, {accuracy:<10}, {centered:<10}\n" for task, accuracy, centered in rows)


def _differences(suite: SuiteResult) -> list[Difference]:
    """Those of the tasks, and that of their mean."""
    return [*suite.differences, *([suite.summary_difference] if suite.summary_difference else [])]


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_text(path, text.getvalue())


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), surrogates=True)


def _remarks(result: TaskResult) -> Iterator[str]:
    """What has to be said with a task's metrics."""
    if result.remark:
        yield result.remark
    if cut := result.details.get("cut_prompts"):
        yield f"{cut:,} of {result.n:,} prompts lost their beginning: the model's positions end before."
    rows = result.details.get("pass_at_k", [])
    if len(rows) > 1:
        chosen = [row for row in rows if row["k"] & (row["k"] - 1) == 0 or row["k"] == len(rows)]  # powers of two
        yield ", ".join(f"pass@{row['k']} {100 * row['value']:.1f} ± {100 * row['stderr']:.1f}" for row in chosen)


def _shown(result: TaskResult) -> tuple[object, ...]:
    shares = (result.accuracy, result.stderr, result.baseline, result.centered)
    accuracy, stderr, baseline, centered = (f"{100 * share:.1f}" for share in shares)
    return result.name, accuracy, stderr, f"{result.n:,}", baseline, centered


def _csv_row(result: TaskResult) -> tuple[object, ...]:
    metrics = [f"{getattr(result, key):.6f}" for key in ("accuracy", "stderr", "baseline", "centered")]
    return result.name, *metrics[:2], result.n, *metrics[2:], result.remark or ""


def _shown_difference(each: Difference) -> tuple[object, ...]:
    difference, stderr, low, high = (100 * metric for metric in (each.difference, each.stderr, each.low, each.high))
    return each.name, f"{difference:+.1f}", f"{stderr:.1f}", f"{low:+.1f}", f"{high:+.1f}", f"{each.n:,}"


def _first_chats(results: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """One question with its answer of each task, as conversations."""
    chats = []
    for result in [result for result in results if result.answers][:NUM_CHATS]:
        first = result.answers[0]
        turns = (("user", first["question"]), ("assistant", first["answer"]))
        chats.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return chats
