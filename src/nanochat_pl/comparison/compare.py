"""Groups of runs against the first of them: what each metric is, by how much it differs, and what that shows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat_pl.common.errors import UserError, listed
from nanochat_pl.comparison import sequential as anytime
from nanochat_pl.comparison.groups import MAX_NAMED, Group, differing, shown, why_no_pairs
from nanochat_pl.comparison.intervals import (
    ALPHA,
    Difference,
    deviation_of,
    difference_of_means,
    difference_of_pairs,
    holm,
    seeds_needed,
)
from nanochat_pl.comparison.metrics import more_is_better, require_known

MANY_SEEDS = 10_000
BASELINE = "baseline"


@dataclass(frozen=True)
class Row:
    """A metric of a group, beside that of the first group.

    Attributes:
        label: of the group.
        n: runs that have the metric.
        mean, deviation: over them; the deviation is None for one run.
        values: of each run, by its seed.
        difference: None: of the first group itself, or of too few runs for an interval.
        simple_difference: the difference of the means of what is compared, with no word on noise; None of the first.
        relative: that as a share of the baseline's mean.
        adjusted_p: the p of the difference, adjusted for the number of variants.
        seeds_needed: at which a difference of the size seen would be shown; None: it is, or nobody can tell.
        verdict: in words.
    """

    label: str
    n: int
    mean: float
    deviation: float | None
    values: dict[Any, float]
    difference: Difference | None = None
    simple_difference: float | None = None
    relative: float | None = None
    adjusted_p: float | None = None
    seeds_needed: int | None = None
    verdict: str = BASELINE


@dataclass(frozen=True)
class MetricComparison:
    """A metric of all groups; the first row is the baseline's."""

    metric: str
    more_is_better: bool | None
    rows: list[Row]


@dataclass(frozen=True)
class Comparison:
    """All of it.

    Attributes:
        sequential: whether intervals and verdicts hold although one looks after every seed.
        settings: what differs between the groups: of each setting the value in each group.
        remarks: what a reader must know beside the figures.
    """

    stage: str
    groups: list[str]
    metrics: list[MetricComparison]
    sequential: bool
    settings: dict[str, list[Any]]
    remarks: list[str] = field(default_factory=list)


def compare(stage: str, groups: Sequence[Group], metrics: Sequence[str], *, sequential: bool = False) -> Comparison:
    """Compare all groups with the first.

    Args:
        groups: at least one, each with runs.
        metrics: their names.
        sequential: intervals and verdicts that hold at every look, for those who add seeds until something is found.

    Raises:
        UserError: no run has a metric, or none of the first group.
    """
    base, *variants = groups
    require_known(metrics, {name for group in groups for run in group.runs for name in run.metrics})
    if missing := [metric for metric in metrics if not base.values(metric)]:
        raise UserError(f"metrics={missing[0]}: no run of {base.label} has it, which the others are compared with.")
    no_pairs = {group.label: why_no_pairs(base, group) for group in variants}
    compared = [_compare_metric(metric, groups, no_pairs, sequential) for metric in metrics]
    settings = differing([group.settings for group in groups])
    remarks = [*_unpaired(base, variants, no_pairs), *_on_settings(base, variants), *_code_differs(groups)]
    remarks += _on_missing(groups, metrics)
    return Comparison(stage, [group.label for group in groups], compared, sequential, settings, remarks)


def _compare_metric(
    metric: str, groups: Sequence[Group], no_pairs: dict[str, str | None], sequential: bool
) -> MetricComparison:
    better = more_is_better(metric)
    base, *variants = [group for group in groups if group.values(metric)]
    rows = [_row_of(base, metric)]
    rows += [_against(base, group, metric, no_pairs[group.label], sequential) for group in variants]
    tested = [n for n, row in enumerate(rows) if row.difference is not None]
    adjusted = holm([row.difference.p for row in rows if row.difference is not None])
    for n, p in zip(tested, adjusted, strict=True):
        rows[n] = _judged(rows[n], p, len(tested), better, sequential)
    return MetricComparison(metric, better, rows)


def _row_of(group: Group, metric: str) -> Row:
    values = group.values(metric)
    deviation = deviation_of(values) if len(values) > 1 else None
    by_seed = {run.seed: run.metrics[metric] for run in group.runs if metric in run.metrics}
    return Row(group.label, len(values), math.fsum(values) / len(values), deviation, by_seed)


def _against(base: Group, group: Group, metric: str, no_pairs: str | None, sequential: bool) -> Row:
    a, b = _row_of(base, metric), _row_of(group, metric)
    common = [] if no_pairs else [seed for seed in a.values if seed in b.values]
    pairs = [b.values[seed] - a.values[seed] for seed in common]
    difference = None
    if len(pairs) > 1:
        simple = math.fsum(pairs) / len(pairs)
        difference = anytime.always_valid(pairs) if sequential else difference_of_pairs(pairs)
    else:
        simple = b.mean - a.mean
        if min(a.n, b.n) > 1 and sequential:
            by_chance = [y - x for x, y in zip(a.values.values(), b.values.values(), strict=False)]
            difference = anytime.always_valid(by_chance, paired=False)
        elif min(a.n, b.n) > 1:
            difference = difference_of_means([*a.values.values()], [*b.values.values()])
    relative = simple / abs(a.mean) if a.mean else None
    verdict = "" if difference else "one seed: nothing can be said of noise"
    return dataclasses.replace(b, difference=difference, simple_difference=simple, relative=relative, verdict=verdict)


def _judged(row: Row, p: float, family: int, more: bool | None, sequential: bool) -> Row:
    difference = row.difference
    assert difference is not None
    if p <= ALPHA and difference.value:
        rises = difference.value > 0
        words = ("higher", "lower") if more is None else ("better", "worse") if more else ("worse", "better")
        return dataclasses.replace(row, adjusted_p=p, verdict=words[not rises])
    if not difference.value or not difference.deviation:
        return dataclasses.replace(row, adjusted_p=p, verdict="no difference: the means are equal")
    # The first step of Holm's: at this level it is shown whatever the other variants give.
    alpha = ALPHA / family
    if sequential:
        needed = anytime.seeds_needed(difference.value, difference.deviation, alpha)
    else:
        needed = seeds_needed(difference.value, difference.deviation, paired=difference.paired, alpha=alpha)
    needed = max(needed, difference.n + 1)
    count = f"over {MANY_SEEDS:,}" if needed > MANY_SEEDS else f"{needed:,}"
    verdict = f"no difference shown: {count} seeds would be needed"
    return dataclasses.replace(row, adjusted_p=p, seeds_needed=needed, verdict=verdict)


def _unpaired(base: Group, variants: Sequence[Group], no_pairs: dict[str, str | None]) -> list[str]:
    found = []
    for group in variants:
        common = base.by_seed.keys() & group.by_seed.keys()
        if why := no_pairs[group.label]:
            if len(base.runs) > 1 and len(group.runs) > 1:
                found.append(
                    f"{group.label}: its runs are no pairs with those of {base.label}, as {why}: Welch's test."
                )
        elif alone := [run.name for each in (base, group) for run in each.runs if run.seed not in common]:
            found.append(
                f"{group.label}: paired with {base.label} by {len(common)} seeds; the difference leaves out"
                f" {listed(alone, MAX_NAMED)}."
            )
    return found


def _on_settings(base: Group, variants: Sequence[Group]) -> list[str]:
    found = []
    for group in variants:
        keys = differing([base.settings, group.settings])
        if not keys:
            found.append(f"{group.label}: no setting that matters differs from {base.label}; what differs is noise.")
            continue
        parts = [f"{key} ({shown(was)} → {shown(value)})" for key, (was, value) in keys.items()]
        more = ": the difference may come from any of them" if len(parts) > 1 else ""
        found.append(f"{group.label} differs from {base.label} in {listed(parts, MAX_NAMED)}{more}.")
    return found


def _code_differs(groups: Sequence[Group]) -> list[str]:
    """A warning where runs are of different code: then that may be what differs."""
    states: dict[str, dict[str, int]] = {}
    for group in groups:
        for run in group.runs:
            commit, dirty = str(run.entry.git.get("commit") or "")[:7], run.entry.git.get("dirty")
            state = f"{commit or 'no commit'}{' with changes' if dirty else ''}"
            states.setdefault(state, {}).setdefault(group.label, 0)
            states[state][group.label] += 1
    warnings = []
    if len(states) > 1:
        parts = [
            f"{state} ({', '.join(f'{count} of {label}' for label, count in counts.items())})"
            for state, counts in states.items()
        ]
        warnings.append(f"Warning: the runs are of different code: {listed(parts, MAX_NAMED)}.")
    if any(state.endswith("with changes") for state in states):
        warnings.append("Warning: code with changes that are not committed may differ from run to run unseen.")
    return warnings


def _on_missing(groups: Sequence[Group], metrics: Sequence[str]) -> list[str]:
    missing = [
        f"{metric} of {run.name}"
        for metric in metrics
        for group in groups
        for run in group.runs
        if metric not in run.metrics
    ]
    return [f"Not measured: {listed(missing, MAX_NAMED)}."] if missing else []
