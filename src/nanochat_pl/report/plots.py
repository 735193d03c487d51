"""The curves of a stage as small multiples, and the tasks of a suite as bars: SVG beside the Markdown and in the page.

Each panel answers one question, has one unit, and names its lines at their ends instead of in a legend.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nanochat_pl.evaluation.results import TaskResult
from nanochat_pl.evaluation.suites import SuiteResult
from nanochat_pl.report.read import Series, StageRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 400
PANEL_INCHES = (4.1, 2.8)
BARS_INCHES, ROW_INCHES, EDGE_INCHES = 7.4, 0.27, 0.85
MAX_BARS, MAX_NAME = 100, 40

_TICKS = {"labelsize": 9.5, "labelcolor": "#6b7280", "color": "#6b7280", "major.size": 0, "major.pad": 4}
PAPER = "#ffffff"
# Colours by their part in a plot; within the page they are the page's own of these names.
COLORS = {
    "ink": "#1f2328",
    "muted": "#6b7280",
    "grid": "#e5e7eb",
    "first": "#2558b8",
    "second": "#c2410c",
    "faint": "#b9cbed",
    "third": "#15803d",
    "fourth": "#7c3aed",
    "fifth": "#0e7490",
    "sixth": "#be185d",
}
STYLE = {
    "svg.fonttype": "none",
    "axes.unicode_minus": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.edgecolor": COLORS["muted"],
    "axes.linewidth": 0.8,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLORS["grid"],
    "text.color": COLORS["ink"],
    **{f"{axis}tick.{key}": value for axis in "xy" for key, value in _TICKS.items()},
}


@dataclass(frozen=True)
class Line:
    """One series of a panel. ``kind``: ``line``, ``faint`` (a noisy one behind another), or ``dots`` (few values)."""

    series: Series
    label: str = ""
    color: str = "first"
    kind: str = "line"
    errors: Series | None = None


@dataclass(frozen=True)
class Panel:
    """A plot over optimizer steps. ``tokens``, where given, adds an axis of tokens at the top."""

    key: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    tokens: Series | None = None
    from_zero: bool = False
    last_step: int = 1

    @property
    def description(self) -> str:
        """What the plot shows, for those who cannot see it."""
        spans = [
            f"{line.label or self.title} from {line.series.values[0]:.4g} at step {line.series.steps[0]:,} "
            f"to {line.series.values[-1]:.4g} at step {line.series.steps[-1]:,}"
            for line in self.lines
            if line.kind != "faint"
        ]
        return f"{self.title} ({self.unit}): {'; '.join(spans)}"


def panels_of(stage: StageRecord) -> list[Panel]:
    """The panels for which the stage has measured something."""
    column = stage.column
    tokens = stage.series.get("train/tokens")
    last_step = max((series.steps[-1] for series in stage.series.values() if series.steps), default=1)
    candidates = [
        Panel(
            "loss",
            "Loss",
            "nats a token",
            (
                Line(column("train/loss"), kind="faint", color="faint"),
                Line(column("train/loss_smoothed"), "training"),
                Line(column("val/loss"), "validation", "second", "dots"),
            ),
            tokens,
        ),
        Panel(
            "bpb",
            "Validation",
            "bits per byte",
            (Line(column("val/bpb"), color="second", kind="dots", errors=column("val/bpb_stderr")),),
            tokens,
        ),
        *(
            Panel(
                name,
                title,
                "mean of centered accuracies",
                (Line(column(f"{name}/mean"), color="second", kind="dots", errors=column(f"{name}/mean_stderr")),),
                tokens,
            )
            for name, title in (("core", "CORE"), ("chat", "Tasks"))
        ),
        Panel("speed", "Throughput", "tokens a second", (Line(column("train/tokens_per_second")),), from_zero=True),
        Panel("lr", "Learning rate", "× the initial one", (Line(column("train/lr_multiplier")),), from_zero=True),
        Panel("momentum", "Muon momentum", "", (Line(column("train/muon_momentum")),)),
        Panel("decay", "Muon weight decay", "", (Line(column("train/muon_weight_decay")),), from_zero=True),
        Panel("memory", "Peak memory", "GiB", _memory_lines(stage, last_step), from_zero=True),
        Panel("mfu", "Model FLOPs utilisation", "share of the peak", (Line(column("train/mfu")),), from_zero=True),
    ]
    return [kept for panel in candidates if (kept := _measured(panel, last_step)).lines]


def _memory_lines(stage: StageRecord, last_step: int) -> tuple[Line, ...]:
    """What was taken; on a GPU also what the plan foretold, of a CPU's process the libraries are the larger part."""
    taken = Line(stage.column("train/peak_memory_gib"), "taken by tensors")
    reserved = stage.column("train/reserved_memory_gib")
    if not reserved.steps:
        return (Line(taken.series, "resident"),)
    planned = stage.planned_memory_gib
    line = () if planned is None else (Line(Series((1, last_step), (planned, planned)), "planned", "faint"),)
    return (taken, Line(reserved, "reserved", "second"), *line)


def _measured(panel: Panel, last_step: int) -> Panel:
    """The panel with those of its lines that were measured."""
    lines = [line for line in panel.lines if line.series.steps]
    if len(lines) == 1 and lines[0].kind == "faint":
        lines = [Line(lines[0].series, "training")]
    tokens = panel.tokens if panel.tokens and panel.tokens.steps else None
    return replace(panel, lines=tuple(lines), tokens=tokens, last_step=last_step)


def svg(panel: Panel) -> str:
    """The panel as an SVG file on white."""
    return draw_svg(PANEL_INCHES, panel.key, lambda figure: _draw(figure.add_axes((0.1, 0.11, 0.69, 0.7)), panel))


def within_page(drawing: str, prefix: str, description: str) -> str:
    """An SVG file as an element of a page, in the page's colours and font, light or dark.

    Args:
        prefix: unique in the page; begins the ids of the drawing, which share one name space.
        description: for those who cannot see it.
    """
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", drawing[drawing.index("<svg") :], flags=re.S)
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = text.replace("xlink:href", "href").replace(PAPER, "none")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)
    for name, color in COLORS.items():
        text = text.replace(color, f"var(--{name})")

    def opening(found: re.Match[str]) -> str:
        return f'<svg viewBox="{found[1]}" role="img" aria-label="{html.escape(description)}">'

    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', opening, text, count=1)


def draw_svg(inches: tuple[float, float], salt: str, draw: Callable[[Figure], None]) -> str:
    """What ``draw`` puts into a figure, in the style of the report, as SVG: the same for the same figures."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {**STYLE, "svg.hashsalt": salt}
    buffer = io.StringIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=inches, facecolor=PAPER, dpi=144)
        draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _draw(axes: Axes, panel: Panel) -> None:
    ends: list[tuple[float, float, str, str]] = []
    for line in panel.lines:
        series = _thinned(line.series)
        color = COLORS[line.color]
        if line.kind == "faint":
            axes.plot(series.steps, series.values, color=color, linewidth=0.9, zorder=2)
            continue
        marker = "o" if line.kind == "dots" or len(series.steps) == 1 else ""
        axes.plot(
            series.steps,
            series.values,
            color=color,
            linewidth=1.8,
            marker=marker,
            markersize=3.6,
            zorder=3,
            clip_on=False,
        )
        if spans := _spans(line):
            steps, low, high = zip(*spans, strict=True)
            axes.vlines(steps, low, high, color=color, linewidth=1, zorder=3, clip_on=False)
        ends.append((series.steps[-1], line.series.values[-1], line.label, color))
    _set_limits(axes, panel)
    set_ticks(axes)
    if panel.tokens:
        _draw_token_axis(axes, panel.tokens)
    label_ends(axes, ends)
    raised = 20 if panel.tokens else 8
    axes.set_title(panel.title, loc="left", size=10.5, weight="bold", pad=raised)
    axes.set_title(panel.unit, loc="right", size=9, color=COLORS["muted"], pad=raised)


def _thinned(series: Series) -> Series:
    """At most MAX_POINTS values, each the mean of equally many neighbours."""
    stride = -(-len(series.steps) // MAX_POINTS)
    if stride <= 1:
        return series
    starts = range(0, len(series.steps), stride)
    blocks = [series.values[start : start + stride] for start in starts]
    steps = tuple(series.steps[min(start + stride, len(series.steps)) - 1] for start in starts)
    return Series(steps, tuple(sum(block) / len(block) for block in blocks))


def _spans(line: Line) -> list[tuple[int, float, float]]:
    """Step, value less and value plus one standard error, where one was measured."""
    errors = line.errors or Series()
    error_at = dict(zip(errors.steps, errors.values, strict=True))
    values = zip(line.series.steps, line.series.values, strict=True)
    return [(step, value - error_at[step], value + error_at[step]) for step, value in values if step in error_at]


def _set_limits(axes: Axes, panel: Panel) -> None:
    axes.set_xlim(0, max(1, panel.last_step))
    values = [value for line in panel.lines for value in line.series.values]
    values += [end for line in panel.lines for _, *ends in _spans(line) for end in ends]
    low, high = (0.0 if panel.from_zero else min(values)), max(values)
    room = 0.08 * (high - low) or 0.08 * abs(high) or 1.0
    axes.set_ylim(low - (0 if panel.from_zero else room), high + room)


def set_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.tick_params(axis="x", length=3)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(short_number)
    axes.yaxis.set_major_formatter(short_number)


def short_number(value: float, _position: object = None) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _draw_token_axis(axes: Axes, tokens: Series) -> None:
    """Ticks at round numbers of tokens, where the stage had trained on so many."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    first, last = axes.get_xlim()
    at_ends = np.interp([first, last], tokens.steps, tokens.values)
    ticks = [value for value in MaxNLocator(4).tick_values(*at_ends) if at_ends[0] < value <= at_ends[1]]
    top = axes.secondary_xaxis("top")
    top.set_xticks(
        np.interp(ticks, tokens.values, tokens.steps),
        [f"{short_number(value)}{' tokens' if value == ticks[-1] else ''}" for value in ticks],
    )
    top.spines["top"].set_visible(False)
    top.tick_params(labelsize=9, color=COLORS["grid"], length=3, pad=3)


def label_ends(axes: Axes, ends: list[tuple[float, float, str, str]], with_values: bool = True) -> None:
    """Write each line's last value and name beside its end, moved apart where they would touch.

    Args:
        ends: of each line x, y, name and colour.
        with_values: False: the names alone.
    """
    low, high = axes.get_ylim()
    gap = 0.19 if with_values and any(label for _, _, label, _ in ends) else 0.11
    gap = min(gap, 1 / len(ends))
    placed: list[float] = []
    for _step, value, label, color in sorted(ends, key=lambda end: end[1]):
        at = (value - low) / (high - low)
        at = max(at, placed[-1] + gap) if placed else at
        placed.append(at)
        # What is nothing on the axis is shown as nothing.
        nothing = abs(value) < 1e-3 * (high - low)
        text = "0" if nothing else f"{value:.4g}" if abs(value) < 1e4 else short_number(value)
        axes.annotate(
            "\n".join([*([text] if with_values else []), *([label] if label else [])]),
            (1, at),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            color=color,
            size=10,
            va="center",
            linespacing=1.15,
            annotation_clip=False,
        )


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
        axes.set_yticks(list(rows), [drawable(task.name) for task in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(min(-0.02, summary.low if summary else 0.0, *(low for low, _ in ends)), 1.0)
        axes.grid(visible=False)
        axes.grid(axis="x")
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", labelcolor=COLORS["ink"])
        title = drawable(f"{stage}: {summary.name if summary else suite.name}")
        heading = f"{title}   {summary.value:.4f} ± {summary.stderr:.4f}" if summary else title
        figure.text(0.01, 1 - 0.2 / height, heading, size=12, weight="bold", va="center")

    return draw_svg((BARS_INCHES, height), suite.name, draw)


def _error(task: TaskResult) -> float:
    """Standard error of the centered accuracy."""
    return task.stderr / (1 - task.baseline)


def drawable(name: str) -> str:
    """A name as the font of the drawing has it; nothing in it is a formula."""
    plain = " ".join(name.split()).encode("ascii", "replace").decode()
    plain = "".join(sign if sign.isprintable() else "?" for sign in plain)
    return (plain if len(plain) <= MAX_NAME else f"{plain[: MAX_NAME - 3]}...").replace("$", r"\$")
