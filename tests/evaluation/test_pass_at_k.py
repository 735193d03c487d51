"""pass@k without bias."""

from __future__ import annotations

import itertools
import math

import pytest

from nanochat_pl.evaluation.statistics import pass_at_k, pass_at_k_rows, standard_error


@pytest.mark.parametrize("num_correct", range(7))
def test_it_is_the_share_of_all_choices_that_have_a_right_one(num_correct):
    answers = [i < num_correct for i in range(6)]
    for k, estimate in enumerate(pass_at_k(6, num_correct), start=1):
        choices = list(itertools.combinations(answers, k))
        assert estimate == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)


@pytest.mark.parametrize("chance", [0.0, 0.05, 0.5, 1.0])
def test_its_expectation_is_the_chance_that_one_of_k_answers_is_right(chance):
    """That of 1 - (1 - c/n)^k, the obvious estimate, is not: for n = 10, chance 0.05, k = 8 it is 0.25, not 0.34."""
    n = 10
    weights = [math.comb(n, c) * chance**c * (1 - chance) ** (n - c) for c in range(n + 1)]
    for k in range(1, n + 1):
        expected = math.fsum(weight * pass_at_k(n, c)[k - 1] for c, weight in enumerate(weights))
        assert expected == pytest.approx(1 - (1 - chance) ** k, abs=1e-12)


def test_many_answers_make_no_huge_numbers():
    estimates = pass_at_k(1000, 1)
    assert estimates == pytest.approx([k / 1000 for k in range(1, 1001)], abs=1e-12)


def test_rows_of_a_task():
    rows = pass_at_k_rows([0, 1, 3, 1], num_samples=3)
    assert [row["k"] for row in rows] == [1, 2, 3]
    assert [row["value"] for row in rows] == pytest.approx([5 / 12, (0 + 2 / 3 + 1 + 2 / 3) / 4, 3 / 4])
    assert rows[0]["stderr"] == pytest.approx(standard_error([0, 1 / 3, 1, 1 / 3]))
    assert rows[2]["stderr"] == pytest.approx(standard_error([0, 1, 1, 1]))
