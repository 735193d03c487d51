"""Comparisons and fits as rows of text and sentences, for the terminal and for the page."""

from __future__ import annotations

import math

from nanochat_pl.comparison.compare import Comparison, MetricComparison, Row
from nanochat_pl.comparison.intervals import ALPHA, POWER
from nanochat_pl.comparison.scaling import Estimate, IsoFlops, Optimum, Point, PowerLaw

COLUMNS = ("group", "n", "mean", "deviation", "difference", "from", "to", "relative", "p", "verdict")
POINT_COLUMNS = ("run", "FLOPs", "parameters", "tokens", "loss")
OPTIMUM_COLUMNS = (
    "budget",
    "runs",
    "parameters",
    "95 %",
    "tokens",
    "95 %",
    "tokens/parameter",
    "95 %",
    "loss",
    "remark",
)


def cells(row: Row) -> tuple[str, ...]:
    """One cell for each of :data:`COLUMNS`; empty where there is nothing."""
    difference = row.difference
    scale = row.deviation if row.deviation else abs(row.simple_difference or 0.0)
    return (
        row.label,
        str(row.n),
        rounded(row.mean, scale),
        "" if row.deviation is None else f"{row.deviation:.2g}",
        "" if row.simple_difference is None else f"{row.simple_difference:+.3g}",
        "" if difference is None else _end(difference.low),
        "" if difference is None else _end(difference.high),
        "" if row.relative is None else f"{100 * row.relative:+.2g} %",
        "" if row.adjusted_p is None else f"{row.adjusted_p:.2g}",
        row.verdict,
    )


def direction(metric: MetricComparison) -> str:
    """Which way is better, behind the metric's name; empty where that is not known."""
    return "" if metric.more_is_better is None else f" ({'more' if metric.more_is_better else 'less'} is better)"


def what_it_holds(metric: MetricComparison, result: Comparison) -> str:
    """What the figures of a table are, in sentences."""
    base, *variants = metric.rows
    tested = [row for row in variants if row.difference is not None]
    if not tested:
        return f"Differences are from {base.label}. With one seed nothing can be said of noise."
    pairs = {row.difference.paired for row in tested if row.difference is not None}
    how = "pairs of one seed" if pairs == {True} else "unpaired runs" if pairs == {False} else "pairs where there are"
    share = f"{100 * (1 - ALPHA):.0f} %"
    looks = (
        f"{share} intervals that hold at every look together, after each seed"
        if result.sequential
        else f"{share} intervals, for a number of seeds fixed in advance"
    )
    sentence = f"Differences are from {base.label}, of {how}: {looks}."
    if len(tested) > 1:
        sentence += f" p and verdicts allow for {len(tested)} variants (Holm); each interval stands for itself."
    if any(row.seeds_needed for row in tested):
        power = "if it stays as it is" if result.sequential else f"with a power of {100 * POWER:.0f} %"
        sentence += f" Seeds that would be needed: for a difference of the size seen, {power}."
    return sentence


def rounded(value: float, scale: float) -> str:
    """A number with two digits of its noise, or of a difference."""
    if not scale or not math.isfinite(scale):
        return f"{value:.6g}"
    digits = 1 - math.floor(math.log10(scale))
    return f"{value:,.{max(0, min(digits, 8))}f}"


def _end(value: float) -> str:
    return f"{value:+.3g}" if math.isfinite(value) else "−∞" if value < 0 else "∞"


def point_cells(point: Point) -> tuple[str, ...]:
    """One cell for each of :data:`POINT_COLUMNS`."""
    costs = (point.budget, point.parameters, point.tokens)
    return (point.name, *(f"{each:.3g}" for each in costs), f"{point.loss:.5g}")


def optimum_cells(optimum: Optimum) -> tuple[str, ...]:
    """One cell for each of :data:`OPTIMUM_COLUMNS`; empty where nothing is determined, with the reason."""
    cells = [f"{optimum.budget:.3g}", str(len(optimum.points))]
    for each in (optimum.parameters, optimum.tokens, optimum.ratio):
        cells += ["", ""] if each is None else [f"{each.value:.3g}", interval(each)]
    loss = "" if optimum.loss is None else f"{optimum.loss.value:.5g}"
    return (*cells, loss, f"not determined: {optimum.why}" if optimum.why else "")


def exponents(found: IsoFlops) -> list[str]:
    """How the optima grow with the budget, in sentences."""
    determined = [each for each in found.optima if each.parameters is not None]
    if found.parameters_exponent is None or found.tokens_exponent is None:
        return [
            f"Exponents: not determined, with {len(determined)} of {len(found.optima)} budgets that have an optimum."
        ]
    return [
        f"Best parameters ∝ FLOPs^{with_interval(found.parameters_exponent)},"
        f" best tokens ∝ FLOPs^{with_interval(found.tokens_exponent)}, of {len(determined)} budgets."
    ]


def law(found: PowerLaw, metric: str, over: str) -> list[str]:
    """A power law in sentences."""
    line = (
        f"{metric} = E + A × {over}^-alpha: E = {with_interval(found.floor)}, A = {with_interval(found.factor)},"
        f" alpha = {with_interval(found.exponent)}, of {len(found.x)} runs."
    )
    return [line, *([f"Not determined: {found.why}."] if found.why else [])]


def with_interval(estimate: Estimate) -> str:
    """A number and its interval, where there is one."""
    around = interval(estimate)
    return f"{estimate.value:.3g} ({around})" if around else f"{estimate.value:.3g} (no interval)"


def interval(estimate: Estimate) -> str:
    """An interval, empty where there is none."""
    return "" if estimate.low is None or estimate.high is None else f"{estimate.low:.3g} … {estimate.high:.3g}"
