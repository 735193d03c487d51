"""Intervals hold the truth as often as they say; so does the test that is looked at after every seed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nanochat_pl.comparison import sequential
from nanochat_pl.comparison.intervals import difference_of_means, difference_of_pairs, holm, seeds_needed


def two_errors(share: float, n: int) -> float:
    return 2 * math.sqrt(share * (1 - share) / n)


def test_an_interval_by_hand() -> None:
    """Student's t with 4 degrees of freedom: 2.776 at 97.5 %."""
    found = difference_of_pairs([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451 * math.sqrt(2.5) / math.sqrt(5)
    assert (found.value, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half))
    assert found.p == pytest.approx(0.0132, abs=1e-4)
    assert (found.n, found.paired) == (5, True)


def test_welch_as_in_the_textbook() -> None:
    """Equal sizes and variances: the degrees of freedom are those of the t test, 2n - 2."""
    found = difference_of_means([1, 2, 3, 4, 5], [2, 3, 4, 5, 6])
    assert found.high - found.value == pytest.approx(2.306004 * 1.0)  # t with 8 degrees of freedom × sqrt(2.5 × 2 / 5)
    assert not found.paired


@pytest.mark.parametrize("paired", [True, False])
def test_fixed_intervals_cover_as_often_as_they_say(paired: bool) -> None:
    draws, n, truth = 2000, 5, 0.3
    generator, inside = np.random.default_rng(1), 0
    for _ in range(draws):
        a, b = generator.normal(0, 1, n), generator.normal(truth, 3, n)
        found = difference_of_pairs(list(b - a)) if paired else difference_of_means(list(a), list(b))
        inside += found.low <= truth <= found.high
    assert abs(inside / draws - 0.95) <= 1.5 * two_errors(0.95, draws)


def looks(differences: np.ndarray) -> int | None:
    """After how many seeds somebody who looks after each from the second on calls it different; None: never."""
    for n in range(2, len(differences) + 1):
        found = sequential.always_valid(list(differences[:n]))
        assert (found.low > 0 or found.high < 0) == (found.p < 0.05)
        if found.p < 0.05:
            return n
    return None


def test_looking_after_every_seed_finds_no_more_than_alpha_of_nothing() -> None:
    draws = 200
    generator = np.random.default_rng(2)
    called = sum(looks(generator.normal(0, 0.004, 20)) is not None for _ in range(draws))
    assert called / draws <= 0.05 + two_errors(0.05, draws)


def test_looking_after_every_seed_with_the_usual_test_finds_far_more() -> None:
    """Why there is another one."""
    generator = np.random.default_rng(3)
    called = sum(
        any(difference_of_pairs(list(values[:n])).p < 0.05 for n in range(2, 21))
        for values in generator.normal(0, 1, (200, 20))
    )
    assert called / 200 > 0.15


def test_an_effect_of_one_deviation_is_found_in_most_within_twenty() -> None:
    generator = np.random.default_rng(4)
    found = [looks(generator.normal(1, 1, 20)) for _ in range(100)]
    assert sum(each is not None for each in found) > 70
    assert 8 <= np.median([each or 99 for each in found]) <= 16


@pytest.mark.parametrize(
    ("ratio", "paired", "expected"), [(1.0, True, 10), (1.0, False, 17), (0.5, True, 34), (0.5, False, 64)]
)
def test_seeds_needed_are_those_of_power_tables(ratio: float, paired: bool, expected: int) -> None:
    assert seeds_needed(-ratio * 0.004, 0.004, paired=paired) == expected


def test_seeds_needed_at_the_ends() -> None:
    assert seeds_needed(100.0, 1.0, paired=True) == 2
    assert seeds_needed(1.0, 0.0, paired=True) == 2
    assert seeds_needed(0.01, 1.0, paired=True) == 78489  # 7.85 / 0.01²
    assert seeds_needed(1.0, 1.0, paired=True, alpha=0.025) > 10
    assert sequential.seeds_needed(1.0, 1.0) > 10
    assert sequential.half_width(sequential.seeds_needed(0.5, 1.0)) < 0.5


def test_holm() -> None:
    """The example of every textbook: 0.01, 0.04, 0.03 → 0.03, 0.06, 0.06."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_equal_in_every_pair_is_no_difference() -> None:
    for test in (difference_of_pairs, sequential.always_valid):
        assert test([0.0, 0.0, 0.0]).p == 1
        assert test([0.5, 0.5, 0.5]).p == 0


def test_the_first_looks_allow_no_interval() -> None:
    assert sequential.half_width(2) == math.inf
    assert sequential.half_width(5) < 3
