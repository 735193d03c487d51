"""A test that may be looked at after every seed, and stopped at, without finding more than alpha of what is not there.

The e-value of Student's t: the likelihood ratio of the t statistic under an effect size (mean over standard deviation)
that is drawn from a normal distribution around 0, against that under no effect::

    e = sqrt(r) * ((1 + x) / (1 + r x)) ** (n / 2),   x = t**2 / (n - 1),   r = 1 / (1 + n * SCALE**2)

It is a likelihood ratio of what is left of the data when mean and deviation have no unit, hence a martingale without an
effect, whatever the deviation is; by Ville's inequality it ever reaches 1 / alpha with probability at most alpha.
Sources: Lai 1976 (Annals of Statistics 4); Pérez-Ortiz, Lardy, de Heide and Grünwald (arXiv 2208.07610); Wang and
Ramdas (arXiv 2310.03722). In contrast to group-sequential bounds (Lan and DeMets 1983) the greatest number of seeds is
not fixed beforehand: whether another seed is worth its hours is decided as one goes.

Runs that are no pairs are paired by chance, the first with the first: their differences are independent and have one
distribution, however differently the two groups vary, so the same holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from nanochat_pl.comparison.intervals import ALPHA, Difference, deviation_of, p_without_noise

# Standard deviation of the effect sizes that are thought of, in deviations of a pair's difference. A larger one finds
# large effects after fewer seeds, and small ones after more.
SCALE = 2.0
MOST = 100_000


def always_valid(differences: Sequence[float], alpha: float = ALPHA, *, paired: bool = True) -> Difference:
    """The mean of differences, at least two, with an interval that holds at all looks together.

    Returns:
        interval and p are the always-valid ones: the interval holds the truth at every n with probability ``1 -
        alpha``; p = 1 / e, at most 1. The interval is infinite for the first few seeds.
    """
    n, value, deviation = len(differences), math.fsum(differences) / len(differences), deviation_of(differences)
    half = deviation * half_width(n, alpha) if deviation else 0.0
    e = log_e_value(n, n * (value / deviation) ** 2) if deviation else 0.0
    p = math.exp(-max(0.0, e)) if deviation else p_without_noise(value)
    return Difference(value, value - half, value + half, p, deviation, n, paired)


def log_e_value(n: int, t_squared: float) -> float:
    """Logarithm of the e-value of a t statistic of n differences."""
    r, x = _ratio(n), t_squared / (n - 1)
    return 0.5 * math.log(r) + n / 2 * (math.log1p(x) - math.log1p(r * x))


def half_width(n: int, alpha: float = ALPHA) -> float:
    """Half the width of the always-valid interval, in standard deviations of a difference; may be infinite."""
    r = _ratio(n)
    grown = (1 / (alpha * math.sqrt(r))) ** (2 / n)
    if grown * r >= 1:
        return math.inf
    return math.sqrt((n - 1) / n * (grown - 1) / (1 - grown * r))


def seeds_needed(value: float, deviation: float, alpha: float = ALPHA) -> int:
    """Pairs at which a difference of this size, not 0, would be shown if it stayed as it is; :data:`MOST` or more."""
    size = abs(value) / deviation if deviation else math.inf
    return next((n for n in range(2, MOST) if half_width(n, alpha) < size), MOST)


def _ratio(n: int) -> float:
    return 1 / (1 + n * SCALE**2)
