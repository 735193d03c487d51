"""CORE as a table: the mean of the tasks' centered accuracies, and the file in which it is published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nanochat_pl.common.files import write_text
from nanochat_pl.evaluation.core.bundle import CORE_TASKS
from nanochat_pl.evaluation.results import Summary, TaskResult, summarize


def summarize_core(results: Sequence[TaskResult]) -> Summary:
    """CORE of some results (at least one), with its interval. Its name says where tasks are missing."""
    return summarize(core_name([result.name for result in results]), results)


def core_name(tasks: Sequence[str]) -> str:
    """ "CORE", which is a mean of 22 tasks; of others their number is said."""
    if set(tasks) == set(CORE_TASKS):
        return "CORE"
    ours = len(set(tasks) & set(CORE_TASKS))
    others = f" and {len(set(tasks)) - ours} others" if len(set(tasks)) > ours else ""
    return f"CORE ({ours} of {len(CORE_TASKS)} tasks{others})"


def core_table(results: Sequence[TaskResult]) -> str:
    """The published file: a line a task, accuracy and centered accuracy to six digits, then their mean."""
    mean = sum(result.centered for result in results) / len(results)
    lines = [_line("Task", "Accuracy", "Centered")]
    lines += [_line(result.name, f"{result.accuracy:.6f}", f"{result.centered:.6f}") for result in results]
    return "".join([*lines, _line(core_name([result.name for result in results]), "", f"{mean:.6f}")])


def write_core_csv(path: Path, results: Sequence[TaskResult]) -> None:
    """Write :func:`core_table`, and beside it nothing: standard errors and the interval are in other files.

    Raises:
        UserError: the disk refuses.
    """
    write_text(path, core_table(results))


def _line(task: str, accuracy: str, centered: str) -> str:
    return f"{task:<35}, {accuracy:<10}, {centered:<10}\n"
