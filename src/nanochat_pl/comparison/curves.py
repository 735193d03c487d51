"""The mean curve of runs that differ in their seed, and how far they lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

POINTS = 200

# x, ascending, and y.
Numbers = Sequence[float] | npt.NDArray[np.float64]
Curve = tuple[Numbers, Numbers]


@dataclass(frozen=True)
class Band:
    """A mean with one standard deviation to each side.

    Attributes:
        x, mean, low, high: float64 (points,)
        n: curves; of one, low and high are the mean.
    """

    x: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    n: int


def band_of(curves: Sequence[Curve]) -> Band | None:
    """The mean of curves where all of them are known; None: nowhere.

    Curves with the same x are averaged point by point, others between their points on straight lines.

    """
    xs = [np.asarray(x, dtype=float) for x, _ in curves]
    if not curves or not all(map(len, xs)):
        return None
    if all(np.array_equal(x, xs[0]) for x in xs):
        grid = xs[0]
    else:
        first, last = max(x[0] for x in xs), min(x[-1] for x in xs)
        if last < first:
            return None
        grid = np.linspace(first, last, POINTS)
    values = np.array([np.interp(grid, x, y) for x, (_, y) in zip(xs, curves, strict=True)])
    mean = values.mean(axis=0)
    apart = values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros_like(mean)
    return Band(grid, mean, mean - apart, mean + apart, len(curves))


def difference_of_curves(a: Curve, b: Curve) -> Curve | None:
    """``b`` less ``a``, at the x of ``b`` that lie within those of ``a``; None: there are none."""
    x, y = (np.asarray(each, dtype=float) for each in b)
    inside = (x >= a[0][0]) & (x <= a[0][-1])
    return (x[inside], y[inside] - np.interp(x[inside], *a)) if inside.any() else None


def resampled(at: Numbers, x: Numbers, y: Numbers) -> list[float]:
    """The values of a curve at other x, on straight lines between its points."""
    return [float(value) for value in np.interp(at, x, y)]
