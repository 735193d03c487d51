"""Mean curves over seeds, and differences of curves."""

from __future__ import annotations

import numpy as np
import pytest

from nanochat_pl.comparison.curves import band_of, difference_of_curves, resampled


def test_curves_of_the_same_steps_are_averaged_point_by_point() -> None:
    band = band_of([((1, 2, 4), (3.0, 2.0, 1.0)), ((1, 2, 4), (5.0, 2.0, 2.0))])
    assert band is not None
    assert band.x.tolist() == [1, 2, 4]
    assert band.mean.tolist() == [4, 2, 1.5]
    assert (band.high - band.mean).tolist() == pytest.approx([2**0.5, 0, 0.5**0.5])
    assert (band.mean - band.low).tolist() == pytest.approx((band.high - band.mean).tolist())
    assert band.n == 2


def test_curves_over_time_are_averaged_where_all_are_known() -> None:
    """Two straight lines, one machine twice as fast."""
    band = band_of([((0, 10), (10.0, 0.0)), ((0, 20), (10.0, 0.0))])
    assert band is not None
    assert (band.x[0], band.x[-1]) == (0, 10)
    assert band.mean[-1] == pytest.approx((0 + 5) / 2)
    assert np.allclose(band.mean, 10 - 0.75 * band.x)


def test_nothing_in_common_is_no_band() -> None:
    assert band_of([]) is None
    assert band_of([((0, 1), (1.0, 1.0)), ((), ())]) is None
    assert band_of([((0, 1), (1.0, 1.0)), ((2, 3), (1.0, 1.0))]) is None


def test_one_curve_has_no_width() -> None:
    band = band_of([((1, 2), (3.0, 4.0))])
    assert band is not None
    assert band.low.tolist() == band.high.tolist() == [3, 4]


def test_differences_are_taken_where_both_are_known() -> None:
    found = difference_of_curves(((0, 10), (0.0, 10.0)), ((5, 10, 15), (5.5, 10.5, 99.0)))
    assert found is not None
    assert [list(each) for each in found] == [[5, 10], [0.5, 0.5]]
    assert difference_of_curves(((0, 1), (0.0, 0.0)), ((5, 6), (0.0, 0.0))) is None


def test_another_axis_begins_at_nothing() -> None:
    assert resampled((0, 5, 10), (0, 10), (0.0, 100.0)) == [0, 50, 100]
