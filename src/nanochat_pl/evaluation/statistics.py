"""Standard errors and intervals of shares: how far a metric may lie from what more problems would give.

Two outcomes are added to those that were seen, the best and the worst possible: all right of a few problems is no
certainty. For 0 and 1 that is the variance of the interval of Agresti and Coull (1998), for differences of pairs, -1
and 1, that of Bonett and Price (2012).

pass@k is the chance that one of k answers to a problem is right, without bias from n >= k answers. Of n answers c are
right; of all ways to take k of them, ``comb(n - c, k) / comb(n, k)`` have none that is (Chen et al. 2021,
arXiv 2107.03374).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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


def pass_at_k(num_samples: int, num_correct: int) -> list[float]:
    """The estimates for k = 1 … ``num_samples`` of one problem.

    Args:
        num_samples: answers to it.
        num_correct: of them right.
    """
    assert 0 <= num_correct <= num_samples and num_samples > 0
    i = np.arange(num_samples)
    # Answers taken one after the other: the chance that each is wrong, if all before it were. Once it is 0, so are all
    # products that follow.
    still_wrong = (num_samples - num_correct - i) / (num_samples - i)
    return [float(each) for each in 1 - np.cumprod(still_wrong)]


def pass_at_k_rows(num_correct: Sequence[int], num_samples: int) -> list[dict[str, Any]]:
    """pass@k of a task, for k = 1 … ``num_samples``: rows of ``k``, ``value`` and ``stderr`` (over problems).

    Args:
        num_correct: right answers to each problem, at least one problem.
        num_samples: answers to each.
    """
    by_problem = {correct: pass_at_k(num_samples, correct) for correct in set(num_correct)}
    rows = []
    for k in range(1, num_samples + 1):
        values = [by_problem[correct][k - 1] for correct in num_correct]
        rows.append({"k": k, "value": math.fsum(values) / len(values), "stderr": standard_error(values)})
    return rows
