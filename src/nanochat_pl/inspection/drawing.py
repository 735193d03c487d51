"""Tokens as coloured text, and attention weights as images, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nanochat_pl.common.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHAR_INCHES, LINE_INCHES, FONT_SIZE = 0.092, 0.27, 10
LOWEST = -6.0  # from here on a log-probability has the strongest colour


def logprob_colors(logprobs: Sequence[float | None], lowest: float = LOWEST) -> list[str]:
    """A background for each log-probability: white for 0, the darker orange the less likely; grey for None."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colormap = colormaps["Oranges"]
    shares = [None if value is None else min(max(value / lowest, 0.0), 1.0) for value in logprobs]
    return ["#d1d5db" if share is None else to_hex(colormap(0.65 * share)) if share else "#ffffff" for share in shares]


def draw_tokens(texts: Sequence[str], colors: Sequence[str], title: str = "", columns: int = 90) -> Figure:
    """Tokens one after the other, each on its background, in lines of ``columns`` characters.

    Args:
        texts: as :func:`~nanochat_pl.inspection.tokens.show_token` gives them; a line ends after one with ⏎.
        colors: of their backgrounds, as many.

    Raises:
        UserError: there are not as many colours as texts.
    """
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    if len(texts) != len(colors):
        raise UserError(f"{len(texts):,} texts and {len(colors):,} colors: each text has one.")
    pieces: list[tuple[int, int, str, str]] = []  # line, column, text, colour
    line = column = 0
    for text, color in zip(texts, colors, strict=True):
        shown = text or " "
        if column and column + len(shown) > columns:
            line, column = line + 1, 0
        for start in range(0, len(shown), columns):  # a token longer than a line
            piece = shown[start : start + columns]
            line, column = (line + 1, 0) if start else (line, column)
            pieces.append((line, column, piece, color))
            column += len(piece)
        if "⏎" in shown:
            line, column = line + 1, 0
    num_lines = max((piece[0] for piece in pieces), default=0) + 1
    height = num_lines * LINE_INCHES + (0.35 if title else 0.05)
    figure = pyplot.figure(figsize=(columns * CHAR_INCHES, height))
    axes = figure.add_axes((0.0, 0.0, 1.0, num_lines * LINE_INCHES / height))
    axes.set(xlim=(0, columns), ylim=(num_lines, 0))
    axes.axis("off")
    text_style: dict[str, Any] = {"family": "monospace", "size": FONT_SIZE, "va": "center", "parse_math": False}
    for line, column, piece, color in pieces:
        axes.add_patch(Rectangle((column, line + 0.08), len(piece), 0.84, facecolor=color, edgecolor="#e5e7eb"))
        for offset, sign in enumerate(piece):  # one by one: a font's widths are no whole numbers of pixels
            axes.text(column + offset + 0.5, line + 0.5, sign, ha="center", **text_style)
    if title:
        figure.text(0.005, 1 - 0.16 / height, title, size=FONT_SIZE + 1, weight="bold", va="center")
    return figure


def draw_attention(weights: Tensor, labels: Sequence[str], window: int, title: str = "") -> Figure:
    """The attention of one layer, a panel a head: rows are queries, columns the keys that they look at.

    Args:
        weights: (H, T, T), as in :class:`~nanochat_pl.inspection.trace.Trace`.
        labels: of the T tokens; shown where there are at most 40.
        window: of the layer, in positions: a dashed line marks its edge where it is shorter than the row.
    """
    from matplotlib import pyplot

    num_heads, length = weights.size(0), weights.size(1)
    columns = min(num_heads, 4)
    rows = -(-num_heads // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(3.1 * columns, 3.1 * rows + 0.3), squeeze=False, layout="constrained"
    )
    for head, axes in enumerate(grid.flat):
        if head >= num_heads:
            axes.axis("off")
            continue
        axes.imshow(weights[head].numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        if window < length - 1:
            axes.plot([-0.5, length - 1 - window], [window, length - 0.5], color="#c2410c", ls="--", lw=1)
        shown = length <= 40
        ticks = range(length) if shown else []
        axes.set_xticks(
            ticks, [_label(text) for text in labels] if shown else [], rotation=90, size=7, family="monospace"
        )
        own = shown and head % columns == 0
        axes.set_yticks(
            ticks if own else [], [_label(text) for text in labels] if own else [], size=7, family="monospace"
        )
        axes.set_title(f"head {head}", size=9)
    figure.suptitle(title, size=11)
    return figure


def _label(text: str) -> str:
    return text.replace("$", r"\$")
