"""Means over seeds and their differences: Student's t, paired where runs are pairs, Welch where they are not.

For pairs ``d_i = b_i - a_i``: mean ± ``t(n - 1, 1 - alpha / 2) * s / sqrt(n)``. Unpaired: Welch (1947), with the
degrees of freedom of Satterthwaite. Seeds that would be needed: by the power of the t test, of the noncentral t
distribution. Several variants against one baseline: Holm (1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ALPHA = 0.05
POWER = 0.8
# From so many seeds on the normal distribution is as good, and nobody trains so many.
_MANY = 500


@dataclass(frozen=True)
class Difference:
    """By how much the mean of a variant exceeds that of the baseline.

    Attributes:
        value: the mean of the variant less that of the baseline, in the metric's unit.
        low, high: the interval of :data:`ALPHA`; infinite where n allows none.
        p: of the test of no difference, two-sided.
        deviation: standard deviation of the differences of pairs; unpaired, of one run, both groups pooled.
        n: pairs; unpaired, the runs of the smaller group.
        paired: whether they are pairs.
    """

    value: float
    low: float
    high: float
    p: float
    deviation: float
    n: int
    paired: bool


def deviation_of(values: Sequence[float]) -> float:
    """Standard deviation of a sample of at least two."""
    return float(np.std(values, ddof=1))


def difference_of_pairs(differences: Sequence[float], alpha: float = ALPHA) -> Difference:
    """The mean of differences, one a pair, at least two."""
    n, value, deviation = len(differences), math.fsum(differences) / len(differences), deviation_of(differences)
    return _difference(value, deviation / math.sqrt(n), n - 1, alpha, deviation, n, paired=True)


def difference_of_means(baseline: Sequence[float], variant: Sequence[float], alpha: float = ALPHA) -> Difference:
    """The difference of the means of two independent groups, each of at least two runs, which may vary differently."""
    sizes = np.array([len(baseline), len(variant)])
    variances = np.array([np.var(baseline, ddof=1), np.var(variant, ddof=1)])
    value = math.fsum(variant) / len(variant) - math.fsum(baseline) / len(baseline)
    parts = variances / sizes
    error = math.sqrt(parts.sum())
    freedom = float(parts.sum() ** 2 / (parts**2 / (sizes - 1)).sum()) if error else float(sizes.sum() - 2)
    pooled = math.sqrt((variances * (sizes - 1)).sum() / (sizes.sum() - 2))
    return _difference(value, error, freedom, alpha, pooled, int(sizes.min()), paired=False)


def seeds_needed(value: float, deviation: float, *, paired: bool, alpha: float = ALPHA, power: float = POWER) -> int:
    """Seeds (pairs; unpaired, runs of each group) at which a difference of this size is shown with this power.

    Args:
        value: the difference, not 0.
        deviation: of the differences of pairs; unpaired, of one run.
    """
    ratio = abs(value) / deviation if deviation else math.inf
    groups = 1 if paired else 2
    if ratio == math.inf:
        return 2
    special = _special()
    about = groups * ((special.ndtri(1 - alpha / 2) + special.ndtri(power)) / ratio) ** 2
    if about > _MANY:
        return math.ceil(about)
    n = np.arange(2, math.ceil(about) + 40)
    freedom, shift = groups * (n - 1), ratio * np.sqrt(n / groups)
    bound = special.stdtrit(freedom, 1 - alpha / 2)
    # Far from 0 the distribution's tail is below what its series can give.
    far = shift - bound > 8
    shift = np.where(far, 0.0, shift)
    reached = 1 - special.nctdtr(freedom, shift, bound) + special.nctdtr(freedom, shift, -bound)
    return int(n[np.argmax(far | (reached >= power))])


def holm(p: Sequence[float]) -> list[float]:
    """The p values of a family, adjusted: those at most alpha are false in any of them with probability alpha."""
    order = np.argsort(p)
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = highest
    return adjusted


def p_without_noise(value: float) -> float:
    """The p of a difference that is the same in all pairs: what differs, differs."""
    return 0.0 if value else 1.0


def _special() -> Any:
    """SciPy's distributions, loaded when the first is asked for: half a second that no other command waits for."""
    from scipy import special

    return special


def _difference(
    value: float, error: float, freedom: float, alpha: float, deviation: float, n: int, paired: bool
) -> Difference:
    special = _special()
    half = float(special.stdtrit(freedom, 1 - alpha / 2)) * error
    p = 2 * float(special.stdtr(freedom, -abs(value) / error)) if error else p_without_noise(value)
    return Difference(value, value - half, value + half, p, deviation, n, paired)
