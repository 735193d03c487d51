"""The tasks of a suite as a picture of bars: how far each is from guessing to all right, with its standard error."""

from __future__ import annotations

from collections.abc import Sequence

from nanochat_pl.report.evaluations import Summary, TaskResult
from nanochat_pl.report.plots import PRINT, drawing_bytes, new_figure

WIDTH_INCHES, ROW_INCHES, EDGE_INCHES = 7.4, 0.27, 0.85
MAX_BARS, MAX_NAME = 100, 40


def centered(task: TaskResult) -> float:
    """Accuracy over the baseline: 0 is guessing, 1 all right."""
    return (task.accuracy - task.baseline) / _room(task) if task.centered is None else task.centered


def centered_error(task: TaskResult) -> float:
    """Its standard error; 0 where there is none."""
    return (task.stderr or 0.0) / _room(task)


def _room(task: TaskResult) -> float:
    return max(1 - task.baseline, 1e-3)


def bars_png(title: str, tasks: Sequence[TaskResult], summary: Summary) -> bytes:
    """A bar for each task, the best first, and the summary with its interval as a line across them; on white."""
    shown = sorted(tasks, key=lambda task: (-centered(task), task.name))[:MAX_BARS]
    rows, values = range(len(shown)), [centered(task) for task in shown]
    ends = [
        (value - centered_error(task), value + centered_error(task)) for task, value in zip(shown, values, strict=True)
    ]
    height = ROW_INCHES * len(shown) + EDGE_INCHES
    figure = new_figure((WIDTH_INCHES, height), PRINT.paper)
    axes = figure.add_axes((0.29, 0.36 / height, 0.62, (height - EDGE_INCHES) / height))
    axes.barh(rows, values, height=0.66, color=PRINT.faint, zorder=2)
    axes.hlines(rows, *zip(*ends, strict=True), color=PRINT.first, linewidth=1.6, zorder=3)
    axes.axvspan(summary.low, summary.high, color=PRINT.second, alpha=0.14, linewidth=0, zorder=1)
    axes.axvline(summary.value, color=PRINT.second, linewidth=1.2, zorder=4)
    axes.axvline(0, color=PRINT.muted, linewidth=0.9, zorder=1)
    for row, value in enumerate(values):
        axes.annotate(
            f"{value:.3f}",
            (1, row),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            size=9,
            va="center",
            color=PRINT.ink,
        )
    axes.set_yticks(list(rows), [_drawable(task.name) for task in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(min(-0.02, summary.low, *(low for low, _ in ends)), 1.0)
    axes.grid(axis="x", color=PRINT.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9.5, labelcolor=PRINT.muted, length=0, pad=4)
    axes.tick_params(axis="y", labelcolor=PRINT.ink)
    heading = f"{_drawable(title)}   {summary.value:.4f} ± {summary.stderr:.4f}"
    figure.text(0.01, 1 - 0.2 / height, heading, size=12, weight="bold", color=PRINT.ink, va="center")
    return drawing_bytes(figure, "png", "")


def _drawable(name: str) -> str:
    """A name as the font of the drawing has it; nothing in it is a formula."""
    plain = " ".join(name.split()).encode("ascii", "replace").decode()
    plain = "".join(sign if sign.isprintable() else "?" for sign in plain)
    return (plain if len(plain) <= MAX_NAME else f"{plain[: MAX_NAME - 3]}...").replace("$", r"\$")
