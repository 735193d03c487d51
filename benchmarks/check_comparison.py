"""How often the tests of `nanochat-pl compare` are wrong: python benchmarks/check_comparison.py [comparisons]

Simulated differences between runs, normal with a deviation of 1 and an effect that is known: the coverage of the
fixed intervals, how often something is called different by those who look after every seed from 2 to 20, and when.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from _report import parser_of, report

from nanochat_pl.comparison import sequential
from nanochat_pl.comparison.intervals import difference_of_means, difference_of_pairs, seeds_needed
from nanochat_pl.comparison.scaling import Point, fit_isoflops, fit_power_law

MOST_SEEDS = 20


def share(count: int, n: int) -> str:
    """A share in percent with its standard error."""
    p = count / n
    return f"{100 * p:.1f} ± {100 * math.sqrt(p * (1 - p) / n):.1f} %"


def looked_at(comparisons: int, effect: float, generator: np.random.Generator) -> dict[str, Any]:
    """Look after every seed, with the always-valid test and with Student's at each look."""
    first, naive = [], 0
    for values in generator.normal(effect, 1, (comparisons, MOST_SEEDS)):
        looks = range(2, MOST_SEEDS + 1)
        first.append(next((n for n in looks if sequential.always_valid(values[:n]).p < 0.05), None))
        naive += any(difference_of_pairs(values[:n]).p < 0.05 for n in looks)
    found = [n for n in first if n is not None]
    return {
        "always valid": share(len(found), comparisons),
        "half of those by seed": float(np.median(found)) if found else None,
        "Student's at each look": share(naive, comparisons),
    }


def fixed(comparisons: int, n: int, generator: np.random.Generator) -> dict[str, Any]:
    """Coverage of the intervals for a number of seeds that was said before."""
    pairs = sum((d := difference_of_pairs(x)).low <= 0 <= d.high for x in generator.normal(0, 1, (comparisons, n)))
    welch = 0
    for _ in range(comparisons):
        d = difference_of_means(generator.normal(0, 1, n), generator.normal(0, 3, n))
        welch += d.low <= 0 <= d.high
    return {"pairs": share(pairs, comparisons), "Welch's, deviations 1 and 3": share(welch, comparisons)}


def power(comparisons: int, effect: float, generator: np.random.Generator) -> dict[str, Any]:
    """Whether as many seeds as are said to be needed show the effect as often as is said."""
    n = seeds_needed(effect, 1.0, paired=True)
    shown = sum(difference_of_pairs(x).p < 0.05 for x in generator.normal(effect, 1, (comparisons, n)))
    return {"seeds needed": n, "shown": share(shown, comparisons)}


def scaling(ladders: int, noise: float, generator: np.random.Generator) -> dict[str, Any]:
    """Coverage of the exponents of seven sizes at four budgets, and of a power law through ten points."""
    inside = {"N ∝ C^0.54": 0, "alpha = 0.3": 0}
    for _ in range(ladders):
        points = []
        for budget in (1e18, 2e18, 5e18, 1e19):
            best = 1e8 * (budget / 1e18) ** 0.54
            for step in np.linspace(-0.9, 0.9, 7):
                size = best * math.exp(step)
                loss = 0.9 * (budget / 1e18) ** -0.05 + 0.04 * step**2 + generator.normal(0, noise)
                points.append(Point("", budget, size, budget / 6 / size, loss))
        exponent = fit_isoflops(points).parameters_exponent
        x = np.geomspace(1e6, 1e9, 10)
        alpha = fit_power_law(list(x), list(0.5 + 0.6 * (x / 1e6) ** -0.3 + generator.normal(0, noise, 10))).exponent
        for name, found, truth in (("N ∝ C^0.54", exponent, 0.54), ("alpha = 0.3", alpha, 0.3)):
            inside[name] += found is not None and found.low is not None and found.low <= truth <= found.high
    return {name: share(n, ladders) for name, n in inside.items()}


def main() -> None:
    """The command."""
    parser = parser_of(__doc__)
    parser.add_argument("comparisons", nargs="?", type=int, default=5000)
    comparisons = parser.parse_args().comparisons
    generator, found = np.random.default_rng(0), {}
    for effect in (0.0, 0.5, 1.0, 2.0):
        found[f"called different by seed {MOST_SEEDS}, effect {effect:g}"] = looked_at(comparisons, effect, generator)
    for n in (3, 5, 10):
        found[f"coverage, n {n}"] = fixed(comparisons, n, generator)
    for effect in (0.5, 1.0, 2.0):
        found[f"power, effect {effect:g}"] = power(comparisons, effect, generator)
    found["exponents in their intervals"] = scaling(max(1, comparisons // 10), 0.002, generator)
    report("check_comparison", comparisons, found)


if __name__ == "__main__":
    main()
