"""pass@k: the chance that one of k answers to a problem is right, without bias from n >= k answers.

Of n answers c are right; of all ways to take k of them, ``comb(n - c, k) / comb(n, k)`` have none that is (Chen et al.
2021, arXiv 2107.03374).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanochat_pl.evaluation.statistics import standard_error


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
