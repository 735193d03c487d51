"""Standard errors and the bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nanochat_pl.evaluation.statistics import DIFFERENCES, PERCENTILES, deviations, standard_error


def binary(right: int, n: int) -> list[float]:
    return [1.0] * right + [0.0] * (n - right)


@pytest.mark.parametrize(("right", "n"), [(0, 1), (3, 3), (9, 10), (250, 1000)])
def test_the_error_of_a_share_is_that_of_agresti_and_coull(right, n):
    share = (right + 1) / (n + 2)
    assert standard_error(binary(right, n)) == pytest.approx(math.sqrt(share * (1 - share) / (n + 2)), rel=1e-12)


def test_the_error_of_differences_is_that_of_bonett_and_price():
    better, worse, n = 7, 3, 30
    pairs = [1.0] * better + [-1.0] * worse + [0.0] * (n - better - worse)
    b, c = (better + 1) / (n + 2), (worse + 1) / (n + 2)
    expected = math.sqrt((b + c - (b - c) ** 2) / (n + 2))
    assert standard_error(pairs, DIFFERENCES) == pytest.approx(expected, rel=1e-12)


def test_the_draws_spread_as_the_standard_error_says():
    outcomes = [*binary(30, 80), 0.25, 0.5, 0.5]
    drawn = deviations(outcomes, 20_000, np.random.default_rng(0))
    assert drawn.shape == (20_000,)
    # Of 20,000 draws the deviation is known to 1% (two of its standard errors), the mean to 1% of the deviation.
    assert drawn.std() == pytest.approx(standard_error(outcomes), rel=0.02)
    assert abs(drawn.mean()) < 0.03 * drawn.std()


def test_the_same_seed_draws_the_same():
    first, again, other = (deviations(binary(3, 9), 50, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_an_interval_of_95_percent_holds_the_truth_so_often():
    """400 evaluations of 60 problems by a model that solves 30% of all problems."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        outcomes = (generator.random(60) < 0.3).astype(float)
        low, high = np.percentile(deviations(list(outcomes), 300, generator), PERCENTILES)
        held += outcomes.mean() + low <= 0.3 <= outcomes.mean() + high
    assert 0.92 <= held / 400 <= 0.98  # its standard error is 1.1%
