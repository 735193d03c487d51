"""Laws of scaling from the runs of a ladder: the best size for a budget of FLOPs, its exponents, and power laws.

Of each budget C a parabola of the loss over ln N; its minimum is the best size N*, and the tokens D* are those of that
size in the budget (Hoffmann et al. 2022, arXiv 2203.15556, approach 2). N* ∝ C^a and D* ∝ C^b are straight lines over
ln C. A power law is ``L = E + A x^-alpha``, with E and A at least 0: for each alpha they follow by least squares, and
the best alpha is searched.

Every interval is of the bootstrap, from the points to the last exponent: where each size has several seeds, seeds are
drawn again, else the residuals of the fit, enlarged by ``sqrt(n / (n - coefficients))``. What the shape of the fit gets
wrong, and what else differs from budget to budget, is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nanochat_pl.common.errors import UserError

Array = npt.NDArray[Any]

DRAWS = 1000
PERCENTILES = (2.5, 97.5)
MIN_SIZES = 3  # of a parabola, and of a power law
# Draws of the bootstrap that may have no minimum, or no power law, before there is no interval.
MAX_FAILED = 0.025
ALPHAS = np.geomspace(0.005, 5, 1000)


@dataclass(frozen=True)
class Point:
    """What a run has cost and reached.

    Attributes:
        budget: training FLOPs that it was to spend; runs of one budget have the same.
        parameters, tokens: its size, as it is counted, and what it was trained on.
        loss: what is to be small.
    """

    name: str
    budget: float
    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Estimate:
    """A number with its interval of 95 %; None: there are no residuals to draw from."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Optimum:
    """The best size of a budget.

    Attributes:
        points: those of the budget.
        parabola: loss over ln N - ``center``, the highest power first.
        parameters, tokens, ratio: at the minimum, and tokens per parameter; None: not determined.
        loss: at the minimum.
        why: why nothing is determined; empty: it is.
    """

    budget: float
    points: tuple[Point, ...]
    parabola: tuple[float, ...] = ()
    center: float = 0.0
    parameters: Estimate | None = None
    tokens: Estimate | None = None
    ratio: Estimate | None = None
    loss: Estimate | None = None
    why: str = ""


@dataclass(frozen=True)
class IsoFlops:
    """Optima of all budgets, in their order, and N* ∝ C^a, D* ∝ C^b; None with fewer than two that are determined."""

    optima: tuple[Optimum, ...]
    parameters_exponent: Estimate | None = None
    tokens_exponent: Estimate | None = None


@dataclass(frozen=True)
class PowerLaw:
    """``L = E + A x^-alpha``.

    Attributes:
        x, y: the points.
        why: what of it is not determined; empty: nothing.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    floor: Estimate
    factor: Estimate
    exponent: Estimate
    why: str = ""

    def at(self, x: float) -> float:
        """The loss at an x."""
        return float(self.floor.value + self.factor.value * x**-self.exponent.value)


def fit_isoflops(points: Sequence[Point], seed: int = 0) -> IsoFlops:
    """The best size of each budget, and how it grows with the budget.

    Args:
        seed: of the bootstrap's draws.
    """
    generator = np.random.default_rng(seed)
    optima, drawn = [], []
    for budget in sorted({point.budget for point in points}):
        optimum, draws = _optimum(budget, [point for point in points if point.budget == budget], generator)
        optima.append(optimum)
        if optimum.parameters is not None:
            drawn.append((optimum, draws))
    if len(drawn) < 2:
        return IsoFlops(tuple(optima))
    logs = np.log([optimum.budget for optimum, _ in drawn])
    exponents = []
    for n, estimates in enumerate(zip(*((each.parameters, each.tokens) for each, _ in drawn), strict=True)):
        values = np.log([estimate.value for estimate in estimates if estimate is not None])
        whole = all(draws is not None for _, draws in drawn)
        of_draws = np.array([draws[n] for _, draws in drawn if draws is not None]) if whole else None
        exponents.append(_estimate(float(_slope(logs, values)), None if of_draws is None else _slope(logs, of_draws)))
    return IsoFlops(tuple(optima), *exponents)


def fit_power_law(x: Sequence[float], y: Sequence[float], seed: int = 0) -> PowerLaw:
    """The power law through points.

    Args:
        x: positive: parameters, tokens, FLOPs, depth.
        y: losses.
        seed: of the bootstrap's draws.

    Raises:
        UserError: the points have fewer than three different x.
    """
    at, values = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len({*at}) < MIN_SIZES:
        raise UserError(f"a power law has three numbers: of {len({*at})} different sizes none can be fitted.")
    unit = math.exp(float(np.log(at).mean()))
    basis = (at / unit)[None, :] ** -ALPHAS[:, None]
    best = _power_laws(basis, values[:, None])[:, 0]
    fitted = best[0] + best[1] * (at / unit) ** -best[2]
    again = _resampled(at, values, fitted, 3, np.random.default_rng(seed))
    draws = None if again is None else _power_laws(basis, again)
    bounded = ALPHAS[1], ALPHAS[-2]
    why = ""
    if not bounded[0] < best[2] < bounded[1] or not best[1]:
        why = "alpha is not determined: the points lie on no such curve"
    elif (
        draws is not None
        and (failed := float(np.mean((draws[2] <= bounded[0]) | (draws[2] >= bounded[1])))) > MAX_FAILED
    ):
        why = f"alpha has no bound: in {100 * failed:.0f} % of the draws the points lie on no such curve"

    def estimate(row: int, in_units: bool = False) -> Estimate:
        found = best[row] * (unit ** best[2] if in_units else 1)
        of_draws = None if draws is None else draws[row] * (unit ** draws[2] if in_units else 1)
        return _estimate(float(found), of_draws)

    return PowerLaw(
        tuple(map(float, x)), tuple(map(float, y)), estimate(0), estimate(1, in_units=True), estimate(2), why
    )


def _optimum(
    budget: float, points: Sequence[Point], generator: np.random.Generator
) -> tuple[Optimum, tuple[Array, Array] | None]:
    """The optimum of a budget, and the draws of ln N* and ln D*."""
    logs = np.log([point.parameters for point in points])
    losses = np.array([point.loss for point in points])
    found = Optimum(budget, tuple(points))
    sizes = len({*logs})
    if sizes < MIN_SIZES:
        return _undetermined(found, f"{sizes} size{'' if sizes == 1 else 's'}: a parabola has three numbers"), None
    center = float(logs.mean())
    parabola = np.polyfit(logs - center, losses, 2)
    found = Optimum(budget, tuple(points), tuple(map(float, parabola)), center)
    if parabola[0] <= 0:
        return _undetermined(found, "the parabola opens downward"), None
    best = _minimum(parabola)
    if not logs.min() < best + center < logs.max():
        side = "smallest" if best + center <= logs.min() else "largest"
        return _undetermined(found, f"the minimum lies at the edge: try sizes beyond the {side}"), None
    along = np.polyfit(logs - center, np.log([point.tokens for point in points]), 2)
    again = _resampled(logs, losses, np.polyval(parabola, logs - center), 3, generator)
    draws = tokens = loss = None
    if again is not None:
        parabolas = np.polyfit(logs - center, again, 2)
        upward = parabolas[0] > 0
        if (failed := 1 - float(upward.mean())) > MAX_FAILED:
            why = f"the noise is too large: in {100 * failed:.0f} % of the draws the parabola opens downward"
            return _undetermined(found, why), None
        # The few draws without a minimum become others of them: all budgets have as many.
        parabolas = parabolas[:, np.flatnonzero(upward)[np.arange(DRAWS) % int(upward.sum())]]
        draws = _minimum(parabolas)
        tokens, loss = np.polyval(along, draws), _values(parabolas, draws)
    found = Optimum(
        budget,
        found.points,
        found.parabola,
        center,
        parameters=_exponential(float(best) + center, None if draws is None else draws + center),
        tokens=_exponential(float(np.polyval(along, best)), tokens),
        ratio=_exponential(
            float(np.polyval(along, best) - best) - center,
            None if draws is None or tokens is None else tokens - draws - center,
        ),
        loss=_estimate(float(np.polyval(parabola, best)), loss),
    )
    return found, None if draws is None or tokens is None else (draws + center, tokens)


def _undetermined(optimum: Optimum, why: str) -> Optimum:
    return Optimum(optimum.budget, optimum.points, optimum.parabola, optimum.center, why=why)


def _resampled(x: Array, y: Array, fitted: Array, coefficients: int, generator: np.random.Generator) -> Array | None:
    """Values as they might have come out: (points, DRAWS); None where the fit goes through all points."""
    groups = [np.flatnonzero(x == value) for value in np.unique(x)]
    if all(len(group) > 1 for group in groups):
        drawn = np.empty((len(x), DRAWS))
        for group in groups:
            # Of few seeds the bootstrap's spread is too small by sqrt((n - 1) / n).
            middle = y[group].mean()
            scale = math.sqrt(len(group) / (len(group) - 1))
            drawn[group] = middle + scale * (generator.choice(y[group], (len(group), DRAWS)) - middle)
        return drawn
    if len(x) <= coefficients:
        return None
    residuals = (y - fitted) * math.sqrt(len(x) / (len(x) - coefficients))
    return fitted[:, None] + generator.choice(residuals, (len(x), DRAWS))


def _power_laws(basis: Array, values: Array) -> Array:
    """The best law for each column of values: (floor, factor, alpha) × columns, of x in units of its middle.

    Args:
        basis: x^-alpha: (alphas, points).
        values: (points, columns)
    """
    n = basis.shape[1]
    sums, squares = basis.sum(axis=1)[:, None], (basis**2).sum(axis=1)[:, None]
    totals, products = values.sum(axis=0)[None, :], basis @ values
    factor = (n * products - sums * totals) / (n * squares - sums**2)
    floor = (totals - factor * sums) / n
    # At a bound the other number follows alone.
    factor = np.where(floor < 0, products / squares, factor)
    floor = np.maximum(floor, 0)
    floor = np.where(factor < 0, totals / n, floor)
    factor = np.maximum(factor, 0)
    errors = n * floor**2 + factor**2 * squares + 2 * floor * factor * sums - 2 * floor * totals - 2 * factor * products
    at = np.argmin(errors, axis=0), np.arange(values.shape[1])
    return np.array([floor[at], factor[at], ALPHAS[at[0]]])


def _minimum(parabola: Array) -> Array:
    return -parabola[1] / (2 * parabola[0])


def _values(parabolas: Array, x: Array) -> Array:
    return np.asarray((parabolas[0] * x + parabolas[1]) * x + parabolas[2])


def _slope(x: Array, y: Array) -> Array:
    """Of a straight line through y, of each column of it: (points,) or (points, columns)."""
    apart = x - x.mean()
    return np.asarray(apart @ y / (apart @ apart))


def _estimate(value: float, draws: Array | None) -> Estimate:
    if draws is None:
        return Estimate(value)
    low, high = np.percentile(draws, PERCENTILES)
    return Estimate(value, float(low), float(high))


def _exponential(value: float, draws: Array | None) -> Estimate:
    found = _estimate(float(value), draws)
    ends = [None if end is None else math.exp(end) for end in (found.low, found.high)]
    return Estimate(math.exp(found.value), *ends)
