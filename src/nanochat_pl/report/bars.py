"""The tasks of a suite as a picture of bars: how far each is from guessing to all right, with its standard error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_pl.evaluation.results import TaskResult
from nanochat_pl.evaluation.suites import SuiteResult
from nanochat_pl.report.plots import COLORS, draw_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH_INCHES, ROW_INCHES, EDGE_INCHES = 7.4, 0.27, 0.85
MAX_BARS, MAX_NAME = 100, 40


def bars_svg(stage: str, suite: SuiteResult) -> str:
    """A bar for each task, the best first, and the mean, where there is one, with its interval as a line across."""
    summary = suite.summary
    shown = sorted(suite.tasks, key=lambda task: (-task.centered, task.name))[:MAX_BARS]
    rows, values = range(len(shown)), [task.centered for task in shown]
    ends = [(task.centered - _error(task), task.centered + _error(task)) for task in shown]
    height = ROW_INCHES * len(shown) + EDGE_INCHES

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.29, 0.36 / height, 0.62, (height - EDGE_INCHES) / height))
        axes.barh(rows, values, height=0.66, color=COLORS["faint"], zorder=2)
        axes.hlines(rows, *zip(*ends, strict=True), color=COLORS["first"], linewidth=1.6, zorder=3)
        if summary:
            axes.axvspan(summary.low, summary.high, color=COLORS["second"], alpha=0.14, linewidth=0, zorder=1)
            axes.axvline(summary.value, color=COLORS["second"], linewidth=1.2, zorder=4)
        axes.axvline(0, color=COLORS["muted"], linewidth=0.9, zorder=1)
        for row, value in enumerate(values):
            axes.text(1.015, row, f"{value:.3f}", transform=axes.get_yaxis_transform(), size=9, va="center")
        axes.set_yticks(list(rows), [_drawable(task.name) for task in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(min(-0.02, summary.low if summary else 0.0, *(low for low, _ in ends)), 1.0)
        axes.grid(visible=False)
        axes.grid(axis="x")
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", labelcolor=COLORS["ink"])
        title = _drawable(f"{stage}: {summary.name if summary else suite.name}")
        heading = f"{title}   {summary.value:.4f} ± {summary.stderr:.4f}" if summary else title
        figure.text(0.01, 1 - 0.2 / height, heading, size=12, weight="bold", va="center")

    return draw_svg((WIDTH_INCHES, height), suite.name, draw)


def _error(task: TaskResult) -> float:
    """Standard error of the centered accuracy."""
    return task.stderr / (1 - task.baseline)


def _drawable(name: str) -> str:
    """A name as the font of the drawing has it; nothing in it is a formula."""
    plain = " ".join(name.split()).encode("ascii", "replace").decode()
    plain = "".join(sign if sign.isprintable() else "?" for sign in plain)
    return (plain if len(plain) <= MAX_NAME else f"{plain[: MAX_NAME - 3]}...").replace("$", r"\$")
