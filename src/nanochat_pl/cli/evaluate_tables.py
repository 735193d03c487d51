"""What evaluate shows and writes: tables, results.json, a CSV for each suite, answers for people."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from nanochat_pl.cli.evaluate_against import difference_of_bits, differences, summary_difference
from nanochat_pl.cli.evaluate_settings import CHATCORE, Suite
from nanochat_pl.cli.evaluate_suites import Measured
from nanochat_pl.common.console import print_table, rank_zero_print
from nanochat_pl.common.files import write_text
from nanochat_pl.common.schema import to_plain
from nanochat_pl.evaluation.core.table import core_name, write_core_csv
from nanochat_pl.evaluation.results import Difference, Summary, TaskResult, summarize
from nanochat_pl.report.evaluations import answers_file
from nanochat_pl.training.stages.tokenizer import print_comparison

CSV_COLUMNS = ("task", "accuracy", "stderr", "n", "baseline", "centered", "remark")
DIFFERENCES = "differences.csv"
TOKENIZERS = "tokenizer.csv"
PUBLISHED = "core_published.csv"  # CORE in the format of the published results
NUM_CHATS = 6


@dataclass
class SuiteResult:
    """What a suite gave, for one model.

    Attributes:
        suite: which.
        results: of its tasks.
        plain: of what is no task.
        fewer: what tasks gave of fewer problems (``limit``) than ``results`` is of.
    """

    suite: Suite
    results: list[TaskResult] = field(default_factory=list)
    plain: Any = None
    fewer: list[TaskResult] = field(default_factory=list)

    def add(self, measured: Measured) -> None:
        """Take in what a job gave."""
        self.results += measured.results
        self.plain = self.plain if measured.plain is None else measured.plain

    @property
    def summary(self) -> Summary | None:
        """The mean of the tasks, where the suite has one."""
        name = summary_name(self.suite, [each.name for each in self.results])
        return summarize(name, self.results) if name else None

    @property
    def remark(self) -> str | None:
        """What has to be said with the scores of its tasks."""
        said = {result.name: result.details.get("remark") for result in self.results}
        return "; ".join(f"{name}: {remark}" for name, remark in said.items() if remark) or None

    def to_json(self) -> Any:
        """What results.json says of it: rows of samples, or figures and tasks."""
        if isinstance(self.plain, list):
            return self.plain
        value: dict[str, Any] = dict(self.plain or {})
        if self.results:
            value["tasks"] = [task_row(each) for each in self.results]
        if self.fewer:
            value["fewer"] = [task_row(each) for each in self.fewer]
        if summary := self.summary:
            value["summary"] = {**to_plain(summary), "remark": self.remark}
        return value

    def compared_with(self, other: SuiteResult) -> dict[str, Any]:
        """Paired differences, as results.json says them; nothing where there is nothing in common."""
        if isinstance(self.plain, Mapping) and isinstance(other.plain, Mapping):
            return difference_of_bits(self.plain, other.plain)
        found: dict[str, Any] = {}
        if pairs := differences(self.results, other.results):
            found["differences"] = to_plain(pairs)
        names = {each.name for each in self.results} & {each.name for each in other.results}
        name = summary_name(self.suite, [*names])
        if name and (summary := summary_difference(name, self.results, other.results)):
            found["summary_difference"] = to_plain(summary)
        return found


def summary_name(suite: Suite, tasks: Sequence[str]) -> str | None:
    """What the mean of these tasks' centered accuracies is called; None: it means nothing."""
    if not tasks or suite not in ("core", "chat", "chatcore"):
        return None
    if suite == "core":
        return core_name(tasks)
    if suite == "chat" or not {*tasks} & {*CHATCORE}:
        return f"{suite}: mean of the tasks"
    others = sorted({*tasks} - {*CHATCORE})
    missing = len({*CHATCORE} - {*tasks})
    remarks = [f"{len(CHATCORE) - missing} of {len(CHATCORE)} tasks"] if missing else []
    remarks += [f"with {', '.join(others)}"] if others else []
    return f"ChatCORE ({', '.join(remarks)})" if remarks else "ChatCORE"


def task_row(result: TaskResult) -> dict[str, Any]:
    """The figures of a task without its problems."""
    keys = ("name", "accuracy", "stderr", "n", "baseline", "centered", "details")
    return {**{key: getattr(result, key) for key in keys}, "remark": result.details.get("remark")}


def show_suite(found: SuiteResult) -> None:
    """Print a suite's figures."""
    bits = found.plain if found.suite == "bpb" else {}
    if "bpb" in bits:
        rank_zero_print(f"bits per byte: {bits['bpb']:.4f} ± {bits.get('bpb_stderr', float('nan')):.4f}")
    if found.suite == "tokenizer":
        table = found.plain["table"]
        print_comparison([*table[0]], [[*row.values()] for row in table], found.plain["skipped"], title="tokenizer")
    if found.results:
        columns = ("task", "accuracy %", "stderr", "of", "guessing %", "centered %")
        print_table(columns, [_shown(each) for each in found.results], title=found.suite)
    for line in itertools.chain.from_iterable(map(_remarks, found.results)):
        rank_zero_print(line)
    if summary := found.summary:
        value, error, low, high = (
            f"{round(figure, 4) + 0.0:.4f}" for figure in (summary.value, summary.stderr, summary.low, summary.high)
        )
        remark = f" [{found.remark}]" if found.remark else ""
        size = f"{summary.num_tasks} task{'s' if summary.num_tasks > 1 else ''}, n {summary.n:,}"
        rank_zero_print(f"{summary.name}: {value} ± {error} (95%: {low} … {high}), {size}{remark}")


def show_differences(name: str, compared: Mapping[str, Mapping[str, Any]]) -> None:
    """Print by how much the model is better than another."""
    rows = []
    for suite, found in compared.items():
        rows += [(suite, *_difference_row(Difference(**each))) for each in found.get("differences", [])]
        if "summary_difference" in found:
            rows.append((suite, *_difference_row(Difference(**found["summary_difference"]))))
        if "difference" in found:
            error = found.get("difference_stderr", float("nan"))
            rank_zero_print(
                f"bits per byte: {found['difference']:+.4f} ± {error:.4f} against {name}; the rows are not the same."
            )
    if rows:
        columns = ("suite", "task", "difference %", "stderr", "95% from", "to", "pairs")
        print_table(columns, rows, title=f"this model minus {name}, on the same problems")


def write_suite(folder: Path, found: SuiteResult) -> None:
    """Write a suite's CSV, its answers, and CORE's table in the published format."""
    if found.suite == "tokenizer" and (table := found.plain["table"]):
        write_csv(folder / TOKENIZERS, [*table[0]], [[*row.values()] for row in table])
    if not found.results:
        return
    write_csv(folder / f"{found.suite}.csv", CSV_COLUMNS, map(_csv_row, found.results))
    if found.suite == "core":
        write_core_csv(folder / PUBLISHED, found.results)
    for result in found.results:
        if result.answers:
            rows = [{"question": "", "answer": "", **row} for row in result.answers]  # some have no words of their own
            write_lines(folder / answers_file(found.suite, result.name), rows)
    if found.suite == "chat":
        write_lines(folder / "chats.jsonl", _first_chats(found.results))


def remove_tables(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Remove what was written for the suites of an earlier results.json and is not written for those of today's."""
    for name in _tables_of(before) - _tables_of(now):
        (folder / name).unlink(missing_ok=True)


def _tables_of(suites: Mapping[str, Any]) -> set[str]:
    """The files that :func:`write_suite` and :func:`write_differences` write, by what results.json says."""
    names: set[str] = {TOKENIZERS} if "tokenizer" in suites else set()
    for suite in get_args(Suite):
        if tasks := _names_of_tasks(suites.get(suite)):
            names |= {f"{suite}.csv", *(answers_file(suite, task) for task in tasks)}
            names |= {"core": {PUBLISHED}, "chat": {"chats.jsonl"}}.get(suite, set())
            names |= {DIFFERENCES} if {"differences", "summary_difference"} & suites[suite].keys() else set()
    return names


def _names_of_tasks(figures: Any) -> list[str]:
    """The tasks that results.json, which anybody may have written, has of a suite."""
    rows = figures.get("tasks") if isinstance(figures, dict) else None
    return [str(row["name"]) for row in rows if isinstance(row, dict) and "name" in row] if rows else []


def write_differences(folder: Path, suites: Mapping[str, Any]) -> None:
    """All paired differences in results.json as CSV."""
    columns = ("difference", "stderr", "low", "high", "n")
    rows = []
    for suite, figures in suites.items():
        if isinstance(figures, dict):
            pairs = [*figures.get("differences", []), figures.get("summary_difference", {})]
            rows += [(suite, *map(each.get, ("name", *columns)), figures.get("against")) for each in pairs if each]
    if rows:
        write_csv(folder / DIFFERENCES, ("suite", "task", *columns, "against"), rows)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A CSV file with a heading."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_text(path, text.getvalue())


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A file of JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), surrogates=True)


def _remarks(result: TaskResult) -> Iterator[str]:
    """What has to be said with a task's figures."""
    if remark := result.details.get("remark"):
        yield f"{result.name}: {remark}"
    if cut := result.details.get("cut_prompts"):
        yield f"{result.name}: {cut:,} of {result.n:,} prompts lost their beginning: the model's positions end before."
    rows = result.details.get("pass_at_k", [])
    if len(rows) > 1:
        chosen = [row for row in rows if row["k"] in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, len(rows))]
        figures = (f"pass@{row['k']} {100 * row['value']:.1f} ± {100 * row['stderr']:.1f}" for row in chosen)
        yield f"{result.name}: {', '.join(figures)}"


def _shown(result: TaskResult) -> tuple[object, ...]:
    shares = (result.accuracy, result.stderr, result.baseline, result.centered)
    accuracy, stderr, baseline, centered = (f"{100 * share:.1f}" for share in shares)
    return result.name, accuracy, stderr, f"{result.n:,}", baseline, centered


def _csv_row(result: TaskResult) -> tuple[object, ...]:
    figures = [f"{getattr(result, key):.6f}" for key in ("accuracy", "stderr", "baseline", "centered")]
    return result.name, *figures[:2], result.n, *figures[2:], result.details.get("remark") or ""


def _difference_row(each: Difference) -> tuple[object, ...]:
    figures = (each.difference, each.stderr, each.low, each.high)
    difference, stderr, low, high = (100 * figure for figure in figures)
    return each.name, f"{difference:+.1f}", f"{stderr:.1f}", f"{low:+.1f}", f"{high:+.1f}", f"{each.n:,}"


def _first_chats(results: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """One question with its answer of each task, as conversations."""
    chats = []
    for result in [result for result in results if result.answers][:NUM_CHATS]:
        first = result.answers[0]
        turns = (("user", first["question"]), ("assistant", first["answer"]))
        chats.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return chats
