"""Times as people read them."""

from __future__ import annotations

_DAY = 86400
# Estimates: units, the seconds of each, and from how many on it is used.
_ROUGH = (("years", 365.25 * _DAY, 2e8), ("days", _DAY, 2 * _DAY), ("hours", 3600, 3600), ("minutes", 60, 60))


def duration(seconds: float | None) -> str:
    """Seconds in the two largest units: days and hours, hours and minutes, or minutes and seconds."""
    if seconds is None:
        return "—"
    whole = round(seconds)
    if whole >= 2 * _DAY:
        return f"{whole // _DAY:,} days {whole % _DAY // 3600} h"
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60} s"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def rough_duration(seconds: float) -> str:
    """An estimate in one unit: 116 days, 4.8 hours, 5 minutes."""
    unit, length = next(((unit, length) for unit, length, from_ in _ROUGH if seconds >= from_), ("seconds", 1))
    amount = seconds / length
    digits = 0 if amount >= 100 or (unit == "minutes") else 1
    text = f"{amount:,.{digits}f}".removesuffix(".0")
    return f"{text} {unit.removesuffix('s') if text == '1' else unit}"
