"""The picture of the doctor: how long documents are, and where the tokens are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nanochat_pl.report.plots import draw_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS_PER_DOUBLING = 2


def lengths_svg(title: str, noun: str, train: np.ndarray, validation: np.ndarray, row_tokens: int) -> str:
    """Two histograms over lengths on a logarithmic axis: share of the documents, and share of their tokens.

    Args:
        noun: what has a length: ``documents``, ``conversations``.
        train, validation: tokens of each document; empty ones are left out.
        row_tokens: a line at the longest piece that fits into a row.
    """
    splits = {name: lengths[lengths > 0] for name, lengths in (("training", train), ("validation", validation))}
    edges = _edges(np.concatenate(list(splits.values())))
    panels = ((f"{noun.capitalize()} by length", False), (f"Tokens by length of the {noun}", True))

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("constrained")
        figure.suptitle(title)
        for axes, (what, by_tokens) in zip(figure.subplots(1, 2), panels, strict=True):
            for name, lengths in splits.items():
                if len(lengths):
                    counts, _ = np.histogram(lengths, edges, weights=lengths.astype(float) if by_tokens else None)
                    axes.stairs(100 * counts / counts.sum(), edges, fill=name == "training", alpha=0.8, label=name)
            axes.axvline(row_tokens, color="gray", linestyle="--", label=f"row: {row_tokens:,}")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.set(title=what, xlabel="length in tokens", ylabel="% of the split")
            axes.legend()

    return draw_svg((9.6, 3.6), "", draw)


def _edges(lengths: np.ndarray) -> np.ndarray:
    """Edges of bins that are whole numbers of halves of a doubling."""
    low, high = (int(lengths.min()), int(lengths.max())) if len(lengths) else (1, 1)
    first = np.floor(np.log2(low) * BINS_PER_DOUBLING)
    last = np.floor(np.log2(high) * BINS_PER_DOUBLING) + 1
    return np.exp2(np.arange(first, last + 1) / BINS_PER_DOUBLING)
