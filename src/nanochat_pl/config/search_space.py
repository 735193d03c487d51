"""Which values a search may try, in Hydra's grammar: ``a,b``, ``choice(…)``, ``range(…)``, ``interval(…)``, tags."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, QuotedString, RangeSweep
from hydra.errors import HydraException

from nanochat_pl.common.errors import UserError
from nanochat_pl.config.overrides import split_override

MAX_VALUES = 10_000
_FORMS = "choice(a,b), range(1,9), interval(0.1,0.5), int(interval(1,8)) or tag(log,interval(0.001,0.1))"

# What is meant as one of these, and would be taken for a text or for one value.
_MEANT = re.compile(r"\s*(choice|range|interval|tag|int|float|shuffle|sort|glob)\s*\(")


@dataclass(frozen=True)
class Choice:
    """One of some values: numbers, texts, truth values, null."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Interval:
    """A number between two, both included; of whole numbers where ``low`` is one; ``step``: low + n steps alone."""

    low: float
    high: float
    is_log: bool = False
    step: float | None = None

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int)


Dimension = Choice | Interval


def split_space(texts: Sequence[str]) -> tuple[list[str], dict[str, Dimension]]:
    """Part the overrides into those with one value, and the space: what is searched over, by key.

    Raises:
        UserError: what cannot be searched over, all of it together.
    """
    fixed: list[str] = []
    space: dict[str, Dimension] = {}
    problems: list[str] = []
    for text in texts:
        key, raw, problem = split_override(text)
        override = None if problem or key.startswith("~") else _parsed(key, raw)
        if override is None or not override.is_sweep_override():
            if override is None and _MEANT.match(raw):
                problems.append(f"{text}: is no way to say what is tried.")
            fixed.append(text)
        elif key in ("experiment", "run"):
            problems.append(f"{text}: names the trials, and is not searched over; -m runs one job for each.")
        elif key in space:
            problems.append(f"{text}: {key} has been given before.")
        else:
            dimension = _dimension(override.value())
            if dimension is None:
                problems.append(f"{text}: cannot be searched over.")
            else:
                space[key] = dimension
    if problems:
        raise UserError(problems, f"Ways to say what is tried: {_FORMS}.")
    return fixed, space


def text_of(key: str, value: Any) -> str:
    """The override that gives a key this value."""
    return f"{key}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"


def _parsed(key: str, raw: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(f"{key}={raw}")
    except HydraException:
        return None  # text, or what the check of the whole says


def _dimension(sweep: Any) -> Dimension | None:
    tags = sweep.tags if isinstance(sweep, ChoiceSweep | RangeSweep | IntervalSweep) else set()
    if isinstance(sweep, ChoiceSweep):
        values = tuple(value.text if isinstance(value, QuotedString) else value for value in sweep.list)
        simple = all(value is None or isinstance(value, str | int | float) for value in values)
        return Choice(values) if simple and len(set(map(repr, values))) == len(values) else None
    if isinstance(sweep, RangeSweep):
        numbers: list[Any] = list(itertools.islice(sweep.range(), MAX_VALUES + 1))
        if not 0 < len(numbers) <= MAX_VALUES or "log" in tags:
            return None
        low, high = min(numbers), max(numbers)
        whole = all(isinstance(value, int) for value in numbers)
        step = abs(numbers[1] - numbers[0]) if len(numbers) > 1 else 1
        return Interval(low, high, step=step) if whole else Interval(float(low), float(high), step=float(step))
    if isinstance(sweep, IntervalSweep) and sweep.start is not None and sweep.end is not None:
        is_log = "log" in tags
        low, high = sweep.start, sweep.end
        return Interval(low, high, is_log) if low <= high and not (is_log and low <= 0) else None
    return None
