"""Fits find the laws that the points were made of, with intervals that hold them, and say where they cannot."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.comparison import scaling
from nanochat_pl.comparison.scaling import Point, fit_isoflops, fit_power_law

BUDGETS = (1e18, 2e18, 5e18, 1e19)
FLOPS_PER_PARAMETER_AND_TOKEN = 6.0


def best_size(budget: float, exponent: float) -> float:
    return float(1e8 * (budget / 1e18) ** exponent)


def ladder(exponent: float, noise: float = 0.0, seeds: int = 1, shift: float = 0.0, seed: int = 0) -> list[Point]:
    """Seven sizes around the best of each budget; ``shift`` moves them away from it, in powers of e."""
    generator, points = np.random.default_rng(seed), []
    for budget in BUDGETS:
        best = best_size(budget, exponent)
        for step in np.linspace(-0.9, 0.9, 7):
            size = best * math.exp(step + shift)
            for _ in range(seeds):
                loss = 0.9 * (budget / 1e18) ** -0.05 + 0.04 * (step + shift) ** 2 + generator.normal(0, noise)
                tokens = budget / (FLOPS_PER_PARAMETER_AND_TOKEN * size)
                points.append(Point(f"{budget:.0e}-{size:.0e}", budget, size, tokens, loss))
    return points


@pytest.mark.parametrize("exponent", [0.37, 0.54, 0.7])
def test_exponents_of_exact_points_are_exact(exponent: float) -> None:
    found = fit_isoflops(ladder(exponent))
    assert found.parameters_exponent is not None
    assert found.tokens_exponent is not None
    assert found.parameters_exponent.value == pytest.approx(exponent, abs=1e-6)
    assert found.tokens_exponent.value == pytest.approx(1 - exponent, abs=1e-6)
    for budget, optimum in zip(BUDGETS, found.optima, strict=True):
        assert optimum.why == ""
        assert optimum.parameters is not None
        assert optimum.parameters.value == pytest.approx(best_size(budget, exponent))
        assert optimum.loss is not None
        assert optimum.loss.value == pytest.approx(0.9 * (budget / 1e18) ** -0.05)


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_hold_the_exponent_about_as_often_as_they_say(seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bootstrap of few residuals is a little too narrow: 88 % is asked of 95."""
    monkeypatch.setattr(scaling, "DRAWS", 300)
    inside = 0
    for draw in range(60):
        found = fit_isoflops(ladder(0.54, noise=0.002, seeds=seeds, seed=draw)).parameters_exponent
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 0.54 <= found.high
        assert found.high - found.low < 0.2
    assert inside / 60 >= 0.88


# Tokens per parameter of the reference's optima at its four budgets, by the parameters that count, and its exponents.
REFERENCE = {
    "matrices and head": ((11.2, 10.7, 10.8, 10.3), 0.54, 0.49),
    "all": ((3.0, 3.2, 3.6, 4.0), 0.37, 0.50),
    "matrices only": ((17.2, 14.5, 12.1, 8.5), 0.70, 0.41),
}


@pytest.mark.parametrize("counted", REFERENCE)
def test_the_reference_s_ratios_give_the_difference_of_its_exponents(counted: str) -> None:
    """Of its table only D / N is known, which is ∝ C^(b - a); its exponents are of budgets that it does not list."""
    ratios, a, b = REFERENCE[counted]
    points = []
    for budget, ratio in zip(BUDGETS, ratios, strict=True):
        best = math.sqrt(budget / (6 * ratio))
        for step in np.linspace(-0.9, 0.9, 7):
            size = best * math.exp(step)
            points.append(Point("", budget, size, budget / (6 * size), 0.9 + 0.04 * step**2))
    found = fit_isoflops(points)
    assert found.parameters_exponent is not None
    assert found.tokens_exponent is not None
    assert found.tokens_exponent.value - found.parameters_exponent.value == pytest.approx(b - a, abs=0.03)
    for ratio, optimum in zip(ratios, found.optima, strict=True):
        assert optimum.ratio is not None
        assert optimum.ratio.value == pytest.approx(ratio)


def test_a_minimum_at_the_edge_is_not_determined() -> None:
    found = fit_isoflops(ladder(0.5, shift=1.2))
    assert {optimum.why for optimum in found.optima} == {"the minimum lies at the edge: try sizes beyond the smallest"}
    assert found.parameters_exponent is None
    assert found.optima[0].parameters is None


def test_what_opens_downward_is_not_determined() -> None:
    points = [replace(point, loss=2 - point.loss) for point in ladder(0.5)]
    assert {optimum.why for optimum in fit_isoflops(points).optima} == {"the parabola opens downward"}


def test_noise_that_hides_the_curve_is_said() -> None:
    why = [optimum.why for optimum in fit_isoflops(ladder(0.5, noise=0.2)).optima]
    assert all("downward" in each or "edge" in each for each in why)


def test_three_sizes_have_no_interval_and_two_no_parabola() -> None:
    points = ladder(0.5)
    three = [point for n, point in enumerate(points) if n % 7 in (0, 3, 6)]
    found = fit_isoflops(three)
    assert found.parameters_exponent is not None
    assert found.parameters_exponent.value == pytest.approx(0.5)
    assert found.parameters_exponent.low is None
    two = [point for n, point in enumerate(points) if n % 7 in (0, 6)]
    assert fit_isoflops(two).optima[0].why == "2 sizes: a parabola has three numbers"


def test_one_budget_more_that_is_not_determined_leaves_the_exponent() -> None:
    points = [*ladder(0.5), Point("", 1e20, 1e9, 1e10, 0.7), Point("", 1e20, 2e9, 5e9, 0.72)]
    found = fit_isoflops(points)
    assert found.optima[-1].parameters is None
    assert found.parameters_exponent is not None
    assert found.parameters_exponent.value == pytest.approx(0.5)


def power_law(
    floor: float, factor: float, alpha: float, noise: float, seed: int = 0
) -> tuple[list[float], list[float]]:
    x = np.geomspace(1e6, 1e9, 10)
    y = floor + factor * (x / 1e6) ** -alpha + np.random.default_rng(seed).normal(0, noise, len(x))
    return list(x), list(y)


@pytest.mark.parametrize(("floor", "alpha"), [(0.5, 0.3), (0.0, 0.1), (0.7, 1.0)])
def test_a_power_law_of_exact_points_is_found(floor: float, alpha: float) -> None:
    x, y = power_law(floor, 0.6, alpha, 0.0)
    law = fit_power_law(x, y)
    assert law.why == ""
    assert law.exponent.value == pytest.approx(alpha, rel=0.01)
    assert law.floor.value == pytest.approx(floor, abs=0.01)
    assert law.factor.value == pytest.approx(0.6 * 1e6**alpha, rel=0.1)
    assert law.at(3e7) == pytest.approx(floor + 0.6 * 30**-alpha, abs=1e-3)


def test_intervals_of_a_power_law_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "DRAWS", 200)
    inside = 0
    for seed in range(30):
        law = fit_power_law(*power_law(0.5, 0.6, 0.3, 0.002, seed))
        assert law.exponent.low is not None
        assert law.exponent.high is not None
        inside += law.exponent.low <= 0.3 <= law.exponent.high
    assert inside / 30 >= 0.8


def test_a_power_law_that_is_none_says_so() -> None:
    x = [1e6, 1e7, 1e8, 1e9, 1e10]
    assert "alpha is not determined" in fit_power_law(x, [1.0, 1.1, 1.2, 1.3, 1.4]).why
    with pytest.raises(UserError, match="of 2 different sizes"):
        fit_power_law([1, 2, 2], [3, 2, 2.1])


def test_the_same_points_give_the_same_intervals() -> None:
    points = ladder(0.5, noise=0.003)
    assert fit_isoflops(points) == fit_isoflops(points)
