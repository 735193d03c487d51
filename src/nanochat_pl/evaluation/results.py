"""What an evaluation found: outcomes of a task's problems, summaries of several tasks, differences of two models.

Problems carry names, so that two models are compared on the problems that both were given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from nanochat_pl.common import schema
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import setting
from nanochat_pl.evaluation.statistics import DIFFERENCES, PERCENTILES, SHARES, deviations, standard_error

# Raise it with whatever gives other metrics for the same model and problems: prompts, scoring, the reading and judging
# of answers, the choice of problems. What was kept under another number is measured again.
METRICS_VERSION = 2
MAX_ITEMS = 1_000_000  # of a result that is read
MAX_NAME = 200  # characters
DRAWS = 1000  # of the bootstrap
SAME = 1e-9  # metrics that are read may differ by rounding from those that the outcomes give


@dataclass(frozen=True)
class TaskResult:
    """How a model did on one task. Made by :func:`make_result`.

    Attributes:
        accuracy: mean of the outcomes, 0 … 1.
        stderr: standard error of the accuracy, with one right and one wrong answer added: all right of a few problems
            is no certainty.
        centered: ``(accuracy - baseline) / (1 - baseline)``: 0 is guessing, 1 all right.
        items: which problems: distinct names, the same for every model. Not in a row of results.json.
        outcomes: how each came out: 0 or 1, or the share of right answers among several. Not in such a row.
        details: plain JSON: counts, pass@k, what is to be said with the score ("remark").
        answers: one row a problem, for people. Not in such a row.
    """

    name: str
    n: int
    accuracy: float
    stderr: float
    baseline: float
    centered: float
    items: list[str] = field(default_factory=list, repr=False)
    outcomes: list[float] = field(default_factory=list, repr=False)
    details: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def remark(self) -> str | None:
        """What is to be said with the score."""
        remark = self.details.get("remark")
        return str(remark) if remark else None


@dataclass(frozen=True)
class Summary:
    """The mean of several tasks' centered accuracies, as CORE."""

    name: str = setting(doc="Its name.")
    value: float = setting(doc="The mean; each task has the same weight.")
    stderr: float = setting(doc="Its standard error.", at_least=0)
    low: float = setting(doc="Where its interval of 95% begins, by the bootstrap over problems within tasks.")
    high: float = setting(doc="Where it ends.")
    num_tasks: int = setting(doc="Number of tasks.", at_least=1)
    n: int = setting(doc="Number of problems of all of them.", at_least=1)


@dataclass(frozen=True)
class Difference:
    """By how much one model is better than another, on the problems that both were given."""

    name: str = setting(doc="The task's or summary's name.")
    difference: float = setting(
        doc="Of the accuracies (of a summary: of the means of centered accuracies), the first less the second."
    )
    stderr: float = setting(doc="Its standard error, of the pairs.", at_least=0)
    low: float = setting(doc="Where its interval of 95% begins, by the bootstrap over pairs.")
    high: float = setting(doc="Where it ends.")
    n: int = setting(doc="Pairs.", at_least=1)


def make_result(
    name: str,
    items: Sequence[str],
    outcomes: Sequence[float],
    *,
    baseline: float = 0.0,
    details: Mapping[str, Any] | None = None,
    answers: Sequence[dict[str, Any]] = (),
) -> TaskResult:
    """Metrics of outcomes.

    Args:
        items: names of the problems, all different; at least one.
        outcomes: one for each, 0 … 1.
        baseline: accuracy of guessing, below 1.
    """
    n = len(items)
    assert n == len(outcomes) == len(set(items)) and n > 0, f"{name}: {n} items, {len(outcomes)} outcomes"
    assert all(0 <= outcome <= 1 for outcome in outcomes) and 0 <= baseline < 1, f"{name}: outcomes are shares"
    accuracy = math.fsum(outcomes) / n
    return TaskResult(
        name=name,
        n=n,
        accuracy=accuracy,
        stderr=standard_error(outcomes),
        baseline=baseline,
        centered=(accuracy - baseline) / (1 - baseline),
        items=list(items),
        outcomes=[float(outcome) for outcome in outcomes],
        details=dict(details or {}),
        answers=list(answers),
    )


def summarize(name: str, results: Sequence[TaskResult]) -> Summary:
    """The mean of the tasks' centered accuracies, with its interval."""
    assert results, f"{name}: a summary of nothing"
    groups = [(each.outcomes, each.baseline) for each in sorted(results, key=lambda each: each.name)]
    value = math.fsum(each.centered for each in results) / len(results)
    worst = 0.0 - math.fsum(each.baseline / (1 - each.baseline) for each in results) / len(results)
    stderr, low, high = _spread(groups, SHARES)
    n = sum(each.n for each in results)
    return Summary(name, value, stderr, max(worst, value + low), min(1.0, value + high), len(results), n)


def paired_difference(a: TaskResult, b: TaskResult) -> Difference:
    """Accuracy of ``a`` less that of ``b``, on the problems that both were given.

    Raises:
        UserError: there are none.
    """
    return _difference(a.name, [(_pairs(a, b), 0.0)])


def paired_summary(name: str, a: Sequence[TaskResult], b: Sequence[TaskResult]) -> Difference:
    """Mean of the centered accuracies of ``a`` less that of ``b``, over the tasks that both were given.

    Raises:
        UserError: they have no task in common, or one of these without common problems or with another baseline.
    """
    others = {each.name: each for each in b}
    groups = []
    for each in sorted(a, key=lambda each: each.name):
        if (other := others.get(each.name)) is not None:
            if abs(each.baseline - other.baseline) > SAME:
                raise UserError(f"{each.name}: baseline {each.baseline} here and {other.baseline} there.")
            groups.append((_pairs(each, other), each.baseline))
    if not groups:
        raise UserError(f"{name}: the two have no task in common.", fix="Measure both on the same tasks.")
    return _difference(name, groups)


def to_plain(result: TaskResult) -> dict[str, Any]:
    return dict(schema.to_plain(result))


def from_plain(value: Mapping[str, Any], where: str) -> TaskResult:
    """The inverse of :func:`to_plain`, of data that anybody may have written. The metrics are those of its outcomes.

    Raises:
        UserError: it is no result.
    """
    try:
        stated = schema.build(_Stated, value, where)
    except RecursionError as error:
        raise UserError(f"{where}: lists and groups within each other, too many.") from error
    if len({len(stated.items), len(set(stated.items)), len(stated.outcomes), stated.n}) > 1:
        raise UserError(
            f"{where}: n={stated.n}, {len(set(stated.items))} different items of {len(stated.items)}, "
            f"{len(stated.outcomes)} outcomes: must be as many of each."
        )
    return make_result(
        stated.name,
        stated.items,
        stated.outcomes,
        baseline=stated.baseline,
        details=stated.details,
        answers=stated.answers,
    )


def to_row(result: TaskResult) -> dict[str, Any]:
    """What results.json says of a task: its metrics, without its problems."""
    keys = ("name", "accuracy", "stderr", "n", "baseline", "centered", "details", "remark")
    return {key: getattr(result, key) for key in keys}


def from_row(value: Any, where: str) -> TaskResult:
    """The inverse of :func:`to_row`. Rows of before have no details or no centered accuracy, which follows.

    Raises:
        UserError: it is no such row.
    """
    row = schema.build_known(_Row, value, where)
    details = {**row.details, "remark": row.remark} if row.remark else row.details
    centered = (row.accuracy - row.baseline) / (1 - row.baseline) if row.centered is None else row.centered
    return TaskResult(row.name, row.n, row.accuracy, row.stderr, row.baseline, centered, details=details)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row of results.json as it is read: names and bounds of what is in the file."""

    name: str = setting(doc="The task's name.")
    n: int = setting(doc="Problems.", at_least=1, at_most=MAX_ITEMS)
    accuracy: float = setting(doc="Mean of the outcomes.", at_least=0, at_most=1)
    stderr: float = setting(doc="Its standard error.", at_least=0, at_most=1)
    baseline: float = setting(0.0, "Accuracy of guessing.", at_least=0, at_most=0.999)
    centered: float | None = setting(None, "Accuracy over the baseline.", at_most=1)
    details: dict[str, Any] = setting(factory=dict, doc="Counts and the like.")
    remark: str | None = setting(None, "What is to be said with the metrics.", max_length=2000)


@dataclass(frozen=True, kw_only=True)
class _Stated(_Row):
    """A whole result as it is read."""

    name: str = setting(doc="The task's name.", max_length=MAX_NAME)
    items: list[str] = setting(doc="Names of the problems.", max_length=MAX_ITEMS)
    outcomes: list[Annotated[float, Field(ge=0, le=1)]] = setting(doc="One for each.", max_length=MAX_ITEMS)
    answers: list[dict[str, Any]] = setting(factory=list, doc="Rows for people.", max_length=MAX_ITEMS)


def _pairs(a: TaskResult, b: TaskResult) -> list[float]:
    """Outcome of ``a`` less that of ``b`` for each problem that both were given."""
    theirs = dict(zip(b.items, b.outcomes, strict=True))
    pairs = [mine - theirs[item] for item, mine in zip(a.items, a.outcomes, strict=True) if item in theirs]
    if not pairs:
        raise UserError(
            f"{a.name}: the two were not given any problem in common, so they cannot be compared.",
            fix="Measure both with the same limit, and with the same settings of the task.",
        )
    return pairs


def _difference(name: str, groups: Sequence[tuple[Sequence[float], float]]) -> Difference:
    """The mean over groups of (pairs, baseline)."""
    value = math.fsum(math.fsum(pairs) / len(pairs) / (1 - baseline) for pairs, baseline in groups) / len(groups)
    most = math.fsum(1 / (1 - baseline) for _, baseline in groups) / len(groups)
    stderr, low, high = _spread(groups, DIFFERENCES)
    n = sum(len(pairs) for pairs, _ in groups)
    return Difference(name, value, stderr, max(-most, value + low), min(most, value + high), n)


def _spread(groups: Sequence[tuple[Sequence[float], float]], added: tuple[float, float]) -> tuple[float, float, float]:
    """Of the mean over groups of (outcomes, baseline): standard error, and both ends of the interval around it."""
    generator = np.random.default_rng(0)
    errors = [standard_error(outcomes, added) / (1 - baseline) for outcomes, baseline in groups]
    drawn = sum(deviations(outcomes, DRAWS, generator, added) / (1 - baseline) for outcomes, baseline in groups)
    low, high = np.percentile(drawn / len(groups), PERCENTILES)
    return math.hypot(*errors) / len(groups), float(low), float(high)
