"""The picture of the doctor: how long documents are, and where the tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nanochat_pl.report.plots import PRINT, draw_frame, drawing_bytes, new_figure, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS_A_DOUBLING = 2
_INCHES = (9.6, 3.6)


def lengths_png(
    title: str, noun: str, unit: str, train: np.ndarray, validation: np.ndarray, row_tokens: int | None
) -> bytes:
    """Two histograms over lengths on a logarithmic axis: share of the documents, and share of their tokens.

    Args:
        title: of the whole.
        noun: what has a length: ``documents``, ``conversations``.
        unit: of the lengths, e.g. ``tokens``.
        train, validation: length of each document; empty ones are left out.
        row_tokens: a line at the longest piece that fits into a row; None: no line.
    """
    series = [(lengths[lengths > 0], name) for lengths, name in ((train, "training"), (validation, "validation"))]
    edges = _edges([lengths for lengths, _ in series])
    figure = new_figure(_INCHES, PRINT.paper)
    panels: Sequence[Any] = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.06, right=0.975, top=0.76, bottom=0.15, wspace=0.2)
    figure.text(0.06, 0.93, title, size=13, weight="bold", color=PRINT.ink, va="center")
    for axes, what, by_length in ((panels[0], noun.capitalize(), False), (panels[1], unit.capitalize(), True)):
        for lengths, name in series:
            _draw(axes, edges, lengths, by_length, name)
        _finish(axes, edges, row_tokens)
        axes.set_title(
            f"{what} by length of the {noun}" if by_length else f"{what} by length",
            loc="left",
            size=10,
            weight="bold",
            color=PRINT.ink,
            pad=14,
        )
        axes.set_title("% of the split", loc="right", size=8.5, color=PRINT.muted, pad=14)
        axes.set_xlabel(f"length in {unit}", size=9, color=PRINT.muted)
    handles, names = panels[0].get_legend_handles_labels()
    place = {"loc": "center right", "bbox_to_anchor": (0.985, 0.93), "ncols": 2}
    figure.legend(handles, names, frameon=False, fontsize=9.5, labelcolor=PRINT.ink, **place)
    return drawing_bytes(figure, "png", "")


def _edges(series: Sequence[np.ndarray]) -> np.ndarray:
    """Edges of bins that are whole numbers of halves of a doubling."""
    everything = np.concatenate(series)
    low, high = (int(everything.min()), int(everything.max())) if len(everything) else (1, 1)
    first = np.floor(np.log2(low) * BINS_A_DOUBLING)
    last = np.floor(np.log2(high) * BINS_A_DOUBLING) + 1
    return np.exp2(np.arange(first, last + 1) / BINS_A_DOUBLING)


def _draw(axes: Axes, edges: np.ndarray, lengths: np.ndarray, by_length: bool, name: str) -> None:
    if not len(lengths):
        return
    counts, _ = np.histogram(lengths, edges, weights=lengths.astype(float) if by_length else None)
    shares = 100 * counts / counts.sum()
    if name == "training":
        axes.stairs(shares, edges, fill=True, color=PRINT.faint, label=name)
        axes.stairs(shares, edges, color=PRINT.first, linewidth=1.2)
    else:
        axes.stairs(shares, edges, color=PRINT.second, linewidth=1.4, label=name)


def _finish(axes: Axes, edges: np.ndarray, row_tokens: int | None) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    draw_frame(axes, PRINT)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    low, high = float(edges[0]), float(edges[-1])
    if row_tokens is not None:
        low, high = min(low, row_tokens / 2), max(high, row_tokens * 2)
        axes.axvline(row_tokens, color=PRINT.muted, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"row: {row_tokens:,}",
            (row_tokens, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            size=8.5,
            ha="center",
            color=PRINT.muted,
        )
    axes.set_xlim(low, high)
    powers = np.arange(np.ceil(np.log2(low)), np.floor(np.log2(high)) + 1)
    axes.xaxis.set_major_locator(FixedLocator(np.exp2(powers[:: max(1, -(-len(powers) // 6))]).tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value < 1e6 else short_number(value))
