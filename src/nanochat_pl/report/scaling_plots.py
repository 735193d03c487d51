"""Drawings of laws of scaling: parabolas of equal budgets, optima by budget, a power law; with the raw points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nanochat_pl.comparison.scaling import Estimate, IsoFlops, PowerLaw
from nanochat_pl.comparison.words import with_interval
from nanochat_pl.report.comparison_plots import color_of
from nanochat_pl.report.plots import COLORS, draw_svg, drawable, label_ends, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES = (7.6, 4.2)
CURVE_POINTS = 100


def isoflops_svg(found: IsoFlops, metric: str) -> str:
    """The points of each budget over the size, its parabola, and its optimum with the interval of the size."""

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.09, 0.13, 0.75, 0.76))
        ends = []
        for n, optimum in enumerate(found.optima):
            color = COLORS[color_of(n)]
            sizes = np.array([point.parameters for point in optimum.points])
            axes.plot(sizes, [point.loss for point in optimum.points], "o", color=color, markersize=4, alpha=0.7)
            ends.append(
                (1.0, max(optimum.points, key=lambda point: point.parameters).loss, _budget(optimum.budget), color)
            )
            if optimum.parabola:
                x = np.geomspace(sizes.min(), sizes.max(), CURVE_POINTS)
                axes.plot(x, np.polyval(optimum.parabola, np.log(x) - optimum.center), color=color, linewidth=1.3)
            if optimum.parameters is not None and optimum.loss is not None:
                low, high = _ends(optimum.parameters)
                axes.hlines(optimum.loss.value, low, high, color=color, linewidth=2.6, alpha=0.6)
                axes.plot([optimum.parameters.value], [optimum.loss.value], "D", color=color, markersize=6)
        _log_axes(axes, y=False)
        axes.margins(y=0.08)
        label_ends(axes, ends, with_values=False)
        _titles(axes, metric, "parameters")

    return draw_svg(INCHES, "isoflops", draw)


def growth_svg(found: IsoFlops) -> str:
    """The optima over the budget with their intervals, and the straight lines through them; both axes logarithmic."""
    optima = [each for each in found.optima if each.parameters is not None and each.tokens is not None]
    budgets = np.array([each.budget for each in optima])

    def draw(figure: Figure) -> None:
        for left, name, title, exponent in (
            (0.09, "parameters", "Best parameters", found.parameters_exponent),
            (0.6, "tokens", "Best tokens", found.tokens_exponent),
        ):
            axes = figure.add_axes((left, 0.17, 0.38, 0.66))
            estimates = [getattr(each, name) for each in optima]
            values = np.array([each.value for each in estimates])
            color = COLORS["first" if name == "parameters" else "second"]
            axes.vlines(budgets, *zip(*map(_ends, estimates), strict=True), color=color, linewidth=1.6)
            axes.plot(budgets, values, "D", color=color, markersize=5)
            if exponent is not None:
                middle = np.exp(np.log(budgets).mean()), np.exp(np.log(values).mean())
                axes.plot(budgets, middle[1] * (budgets / middle[0]) ** exponent.value, color=color, linewidth=1.2)
            _log_axes(axes, y=True)
            law = "" if exponent is None else f"C^{with_interval(exponent)}".replace("…", "to")
            _titles(axes, title, law)

    return draw_svg((8.6, 3.2), "growth", draw)


def power_law_svg(found: PowerLaw, metric: str, over: str) -> str:
    """The points, the law through them, and its floor with the interval of that."""

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.09, 0.13, 0.75, 0.76))
        color = COLORS["first"]
        x = np.geomspace(min(found.x), max(found.x) * 2, CURVE_POINTS)
        axes.plot(x, [found.at(float(each)) for each in x], color=color, linewidth=1.4)
        axes.plot(found.x, found.y, "o", color=color, markersize=4.5)
        low, high = min(found.y), max(found.y)
        if not found.why and found.floor.value > low - 1.5 * (high - low):
            axes.axhline(found.floor.value, color=COLORS["second"], linewidth=1.1)
            begin, end = _ends(found.floor)
            axes.axhspan(begin, end, color=COLORS["second"], alpha=0.14, linewidth=0)
        _log_axes(axes, y=False)
        axes.margins(y=0.08)
        ends = [(1.0, found.at(float(x[-1])), "law", color)]
        if not found.why and axes.get_ylim()[0] <= found.floor.value:
            ends.append((1.0, found.floor.value, "floor E", COLORS["second"]))
        label_ends(axes, ends)
        _titles(axes, metric, over)

    return draw_svg(INCHES, "power_law", draw)


def _ends(estimate: Estimate) -> tuple[float, float]:
    """Where an interval begins and ends; the number itself where there is none."""
    if estimate.low is None or estimate.high is None:
        return estimate.value, estimate.value
    return estimate.low, estimate.high


def _log_axes(axes: Axes, y: bool) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    axes.set_xscale("log")
    scales: Sequence[Any] = (axes.xaxis, axes.yaxis) if y else (axes.xaxis,)
    if y:
        axes.set_yscale("log")
    for each in scales:
        low, high = each.get_view_interval()
        few = high / low < 30
        each.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
        each.set_minor_locator(NullLocator())
        each.set_minor_formatter(NullFormatter())
        each.set_major_formatter(_amount)
    axes.tick_params(axis="x", length=3)


def _amount(value: float, _position: object = None) -> str:
    return f"{value:.0e}".replace("e+", "e") if value >= 1e12 else short_number(value)


def _budget(budget: float) -> str:
    return f"{budget:.3g} FLOPs".replace("e+", "e")


def _titles(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(drawable(title), loc="left", size=10.5, weight="bold", pad=8)
    axes.set_title(unit, loc="right", size=9, color=COLORS["muted"], pad=8)
