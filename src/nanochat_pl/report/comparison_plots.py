"""Drawings of a comparison: curves over steps, tokens, FLOPs and time with bands over seeds, and final values."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanochat_pl.comparison import MetricComparison, Row
from nanochat_pl.comparison.curves import Band
from nanochat_pl.comparison.intervals import difference_of_pairs
from nanochat_pl.report.plots import COLORS, draw_svg, drawable, label_ends, set_ticks, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OVERLAY_INCHES, DOTS_INCHES = (4.6, 2.9), 8.6
ROW_INCHES, EDGE_INCHES = 0.42, 1.0
GROUP_COLORS = ("first", "second", "third", "fourth", "fifth", "sixth")
BEGINNING = 0.2  # of a curve, as a share of its x
MAX_LABEL, MAX_ROW_LABEL = 17, 24


@dataclass(frozen=True)
class Overlay:
    """Curves of one metric over one axis, of each group that has them."""

    key: str
    title: str
    unit: str
    bands: tuple[tuple[str, str, Band], ...]  # name, colour, band
    from_zero: bool = False  # differences: nothing is cut off, and 0 is in it

    @property
    def description(self) -> str:
        """What the plot shows, for those who cannot see it."""
        spans = [
            f"{name}, mean of {band.n}: from {band.mean[0]:.4g} to {band.mean[-1]:.4g}" for name, _, band in self.bands
        ]
        return f"{self.title} over {self.unit}: {'; '.join(spans)}"


def color_of(index: int) -> str:
    """Name of the colour of a group: beyond the last all are grey."""
    return GROUP_COLORS[index] if index < len(GROUP_COLORS) else "muted"


def overlay_svg(overlay: Overlay) -> str:
    """The curves as an SVG file on white."""

    from matplotlib.ticker import MaxNLocator

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.13, 0.12, 0.58, 0.74))
        for _, color, band in overlay.bands:
            marker = "o" if len(band.x) == 1 else ""
            axes.plot(band.x, band.mean, color=COLORS[color], linewidth=1.6, marker=marker, markersize=4, zorder=3)
            if band.n > 1:
                axes.fill_between(band.x, band.low, band.high, color=COLORS[color], alpha=0.18, linewidth=0, zorder=2)
        _limits(axes, [band for _, _, band in overlay.bands], overlay.from_zero)
        set_ticks(axes)
        axes.yaxis.set_major_formatter(_four_digits)
        if axes.get_xlim()[1] < 5:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        ends = [
            (float(band.x[-1]), float(band.mean[-1]), _short(name, MAX_LABEL), COLORS[color])
            for name, color, band in overlay.bands
        ]
        label_ends(axes, ends, with_values=len(ends) < 5)
        axes.set_title(_short(overlay.title, 26), loc="left", size=10.5, weight="bold", pad=8)
        axes.set_title(overlay.unit, loc="right", size=9, color=COLORS["muted"], pad=8)

    return draw_svg(OVERLAY_INCHES, overlay.key, draw)


def dots_svg(metric: MetricComparison, key: str) -> str:
    """The final values of each run with their means, and the differences with their intervals, a row for each group."""
    rows = metric.rows
    height = ROW_INCHES * len(rows) + EDGE_INCHES
    bottom, share = 0.42 / height, ROW_INCHES * len(rows) / height
    tested = [row for row in rows[1:] if row.simple_difference is not None]

    def draw(figure: Figure) -> None:
        left = figure.add_axes((0.23, bottom, 0.34 if tested else 0.6, share))
        _draw_values(left, rows)
        if tested:
            _draw_differences(figure.add_axes((0.63, bottom, 0.24, share)), rows)
        for x, text in ((0.23, f"{metric.metric}: runs, mean, 95 %"), (0.63, f"minus {rows[0].label}")):
            if x == 0.23 or tested:
                figure.text(x, 1 - 0.22 / height, _short(text, 36), size=10.5, weight="bold", va="center")

    return draw_svg((DOTS_INCHES, height), key, draw)


def _draw_values(axes: Axes, rows: Sequence[Row]) -> None:
    for n, row in enumerate(rows):
        color = COLORS[color_of(n)]
        values = [*row.values.values()]
        axes.plot(values, [n - 0.16] * len(values), "o", color=color, markersize=4, alpha=0.45, clip_on=False)
        if row.deviation:
            interval = difference_of_pairs(values)
            axes.hlines(n + 0.14, interval.low, interval.high, color=color, linewidth=1.8)
        axes.plot([row.mean], [n + 0.14], "D", color=color, markersize=5, clip_on=False)
    _row_axes(axes, len(rows))
    axes.set_yticks(range(len(rows)), [f"{_short(row.label, MAX_ROW_LABEL)}\nn = {row.n}" for row in rows])
    axes.tick_params(axis="y", labelcolor=COLORS["ink"], labelsize=9)


def _draw_differences(axes: Axes, rows: Sequence[Row]) -> None:
    axes.axvline(0, color=COLORS["muted"], linewidth=0.9, zorder=1)
    for n, row in enumerate(rows):
        color, difference = COLORS[color_of(n)], row.difference
        if row.simple_difference is None:
            continue
        if difference is not None and math.isfinite(difference.low):
            axes.hlines(n, difference.low, difference.high, color=color, linewidth=1.8)
        axes.plot([row.simple_difference], [n], "D", color=color, markersize=5, clip_on=False)
        place: Any = axes.get_yaxis_transform()
        axes.text(1.05, n, f"{row.simple_difference:+.2g}", transform=place, size=9, va="center")
    _row_axes(axes, len(rows))
    axes.set_yticks([])


def _row_axes(axes: Axes, count: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylim(count - 0.5, -0.5)
    axes.grid(visible=False)
    axes.grid(axis="x")
    axes.margins(x=0.08)
    axes.spines["bottom"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(_four_digits)


def _limits(axes: Axes, bands: Sequence[Band], from_zero: bool) -> None:
    """All of the x axis, and of y what is left when the steep beginning is cut off: the end is what one compares."""
    last = max(float(band.x[-1]) for band in bands)
    axes.set_xlim(0, last or 1)
    begin = BEGINNING * last
    later = [float(value) for band in bands for each in (band.low, band.high) for value in each[band.x >= begin]]
    low, high = (min(0.0, *later), max(0.0, *later)) if from_zero else (min(later), max(later))
    if from_zero:
        axes.axhline(0, color=COLORS["muted"], linewidth=0.9, zorder=1)
    room = 0.08 * (high - low) or 0.08 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)


def _four_digits(value: float, _position: object = None) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else short_number(value)


def _short(name: str, most: int) -> str:
    """A name of which the end is kept, of a setting its last part: that is what tells groups apart."""
    plain = drawable(re.sub(r"(?:\w+\.)+(\w+=)", r"\1", name))
    return plain if len(plain) <= most else f"...{plain[3 - most :]}"
