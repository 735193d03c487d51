"""Standard errors and intervals of shares: how far a metric may lie from what more problems would give.

Two outcomes are added to those that were seen, the best and the worst possible: all right of a few problems is no
certainty. For 0 and 1 that is the variance of the interval of Agresti and Coull (1998), for differences of pairs, -1
and 1, that of Bonett and Price (2012).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SHARES, DIFFERENCES = (0.0, 1.0), (-1.0, 1.0)  # the worst and the best outcome, which are added
PERCENTILES = (2.5, 97.5)  # of the draws: an interval of 95%


def standard_error(outcomes: Sequence[float], added: tuple[float, float] = SHARES) -> float:
    """Standard error of the mean of independent outcomes.

    Args:
        added: the worst and the best outcome that there are.
    """
    pool = np.array([*outcomes, *added])
    return float(pool.std() / math.sqrt(len(pool)))


def deviations(
    outcomes: Sequence[float], draws: int, generator: np.random.Generator, added: tuple[float, float] = SHARES
) -> np.ndarray:
    """Bootstrap: how far the mean of as many outcomes, drawn with replacement from these, lies from theirs.

    Args:
        outcomes: one a problem; the two ``added`` ones are drawn from as well.
        added: the worst and the best outcome that there are.

    Returns:
        float64 (draws,)
    """
    values, counts = np.unique(np.array([*outcomes, *added]), return_counts=True)
    shares = counts / counts.sum()
    # How often each value is drawn is all that a mean needs. One draw at a time: there may be many values.
    drawn = [generator.multinomial(counts.sum(), shares) @ values for _ in range(draws)]
    return np.array(drawn) / counts.sum() - shares @ values
