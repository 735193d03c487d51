"""Times as people read them."""

from __future__ import annotations

from nanochat_pl.common.durations import duration, rough_duration

DAY = 86400


def test_times_that_were_measured() -> None:
    seconds = (None, 2.5, 59.6, 61, 3725, 47 * 3600, 116 * DAY + 4 * 3600)
    shown = ["—", "2.5 s", "1 min 0 s", "1 min 1 s", "1 h 2 min", "47 h 0 min", "116 days 4 h"]
    assert [duration(each) for each in seconds] == shown


def test_times_that_are_estimates() -> None:
    seconds = (0.25, 42, 90, 3600, 17_280, 2788.1 * 3600, 1.5 * 2e9)
    shown = ["0.2 seconds", "42 seconds", "2 minutes", "1 hour", "4.8 hours", "116 days", "95.1 years"]
    assert [rough_duration(each) for each in seconds] == shown
