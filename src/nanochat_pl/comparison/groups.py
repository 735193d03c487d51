"""Runs of the ledger in groups: in a group runs differ in their seed alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat_pl.common.errors import UserError, did_you_mean, listed
from nanochat_pl.common.run_dir import STAGES
from nanochat_pl.comparison.metrics import metrics_of
from nanochat_pl.ledger import Entry, newest
from nanochat_pl.ledger.query import cells_of, conditions, select

SEED = "seed"
MAX_NAMED = 8
ALIKE = "the first settings"  # of a group that is told by what the others have otherwise
ABSENT = "not set"  # a setting that a run does not have
# What the rows follow from, besides the tokenizer: with others, one seed stands for other rows.
_ROWS = ("model.sequence_len", "data", "mixture")

Settings = Mapping[str, Any]
Matters = Callable[[Settings, str], dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """A finished stage of a run.

    Attributes:
        entry: its line of the ledger.
        settings: those that the result depends on, but for the seed; those of the stages before it as "STAGE: KEY".
        metrics: what was measured, by name.
    """

    entry: Entry
    settings: dict[str, Any]
    metrics: dict[str, float]

    @property
    def name(self) -> str:
        return self.entry.run

    @property
    def seed(self) -> Any:
        return self.entry.settings.get(SEED)

    @property
    def cells(self) -> dict[str, Any]:
        """What can be asked of it in a condition, by name: all that its line has, the stages before it, its metrics."""
        earlier = {name.partition(": ")[2]: value for name, value in self.settings.items() if ": " in name}
        own = {name: value for name, value in self.settings.items() if ": " not in name}
        return {**cells_of(self.entry), **earlier, **own, **self.metrics}

    def setting(self, key: str) -> Any:
        """A setting by its key, of the stage itself or else of one before it; :data:`ABSENT` where there is none."""
        if key in self.settings:
            return self.settings[key]
        earlier = [value for name, value in self.settings.items() if name.partition(": ")[2] == key]
        return earlier[-1] if earlier else self.entry.settings.get(key, ABSENT)


@dataclass(frozen=True)
class Group:
    """Runs of the same settings, one for each seed, in the order of the ledger."""

    label: str
    runs: tuple[Run, ...]

    @property
    def by_seed(self) -> dict[Any, Run]:
        return {run.seed: run for run in self.runs}

    @property
    def settings(self) -> dict[str, Any]:
        return self.runs[0].settings

    def values(self, metric: str) -> list[float]:
        """Of those runs that have it."""
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]


@dataclass
class Chosen:
    """Groups, the first of which the others are compared with, and what is to be said of the choice."""

    groups: list[Group] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read_runs(
    entries: Iterable[Entry],
    stage: str | None,
    matters: Matters,
    names: Sequence[str] = (),
    where: str | None = None,
    by: str | None = None,
) -> tuple[str, list[Run], list[str]]:
    """The finished runs of a stage.

    Args:
        stage: None: the last one, in the order of training, that a run chosen by names and conditions has finished.
        matters: of all settings of a stage those that its result depends on.
        names: runs, or globs of them; none: all.
        where: conditions, as for :func:`keep`; None: none.
        by: a setting. With stage=None, the last stage in which it has several values goes before later ones.

    Returns:
        the stage, its runs in the order of the ledger, and remarks on what is left out.

    Raises:
        UserError: there is none, or a name or a condition fits none.
    """
    last = {(entry.run, entry.stage): entry for entry in newest(entries)}
    known = sorted({run for run, _ in last})
    named = {run for name in names for run in _fitting(name, known)} if names else set(known)
    stages = sorted({each for run, each in last if run in named}, key=_order)
    asked = [stage] if stage is not None else [each for each in stages if each != "tokenizer"]
    finished = {key: last[key] for key in last if key[0] in named and last[key].exit == "finished"}
    if stage is None:
        asked = [each for each in asked if any(key[1] == each for key in finished)]
    if not set(asked) & set(stages):
        there = f"there are entries of {', '.join(stages)}" if stages else "the ledger has no entries yet"
        raise UserError(
            f"stage={stage or 'null'}: no run of that stage; {there}.", "Train one first: nanochat-pl train"
        )
    found = [
        Run(entry, _all_settings(entry, last, matters), metrics_of(entry))
        for key, entry in finished.items()
        if key[1] in asked
    ]
    if where is not None and found:
        found = keep(found, where)
    of_stage = {each: [run for run in found if run.entry.stage == each] for each in asked}
    chosen = _last_stage(of_stage, by) if stage is None else stage
    runs = of_stage[chosen]
    out = [
        f"{run} ({entry.exit}{f': {entry.error}' if entry.error else ''})"
        for (run, each), entry in last.items()
        if each == chosen and run in named and entry.exit != "finished"
    ]
    remarks = [f"Left out, as {chosen} is not finished: {listed(out, MAX_NAMED)}."] if out else []
    if not runs:
        raise UserError(f"stage={chosen}: none of these runs has finished it.", " ".join(remarks))
    more = [f"stage={each} has {len(others)}" for each, others in of_stage.items() if len(others) > len(runs)]
    if stage is None and more:
        remarks.append(f"This is stage {chosen}, the last one, which {len(runs)} of them finished: {', '.join(more)}.")
    return chosen, runs, remarks


def _last_stage(of_stage: Mapping[str, Sequence[Run]], by: str | None) -> str:
    """The last stage that has runs; before it goes the last one in which a setting has several values among them."""
    there = [stage for stage, runs in of_stage.items() if runs]
    differs = [stage for stage in there if by and len({shown(run.setting(by)) for run in of_stage[stage]}) > 1]
    return (differs or there)[-1]


def keep(runs: Sequence[Run], where: str) -> list[Run]:
    """Those of which all conditions are true, in the grammar of :func:`~nanochat_pl.ledger.query.conditions`.

    Raises:
        UserError: with the values that there are, and of which stages, where none is left.
    """
    for condition in conditions(where):
        name = condition.name
        found = select(runs, condition.text)
        if not found:
            values = dict.fromkeys(shown(run.cells.get(name, ABSENT)) for run in runs)
            stages = " or ".join(sorted({run.entry.stage for run in runs}, key=_order))
            raise UserError(
                f"{condition.text}: no run of stage {stages} has it; there are: {listed(list(values), MAX_NAMED)}."
            )
        runs = found
    return list(runs)


def by_name(runs: Sequence[Run], names: Sequence[str]) -> Chosen:
    """A group for each name or glob.

    Raises:
        UserError: the runs of one differ in more than their seed.
    """
    chosen = Chosen()
    for name in dict.fromkeys(names):
        fitting = set(_fitting(name, [run.name for run in runs]))
        _add(chosen, name, [run for run in runs if run.name in fitting])
    return chosen


def by_setting(runs: Sequence[Run], key: str | None) -> Chosen:
    """A group for each value of a setting, the default first where it is among them.

    Args:
        key: None: for each combination of the settings in which they differ.

    Raises:
        UserError: they differ in nothing, or besides the key in others.
    """
    if key is not None:
        _require_key(key, runs)
    keys = [key] if key is not None else list(differing([run.settings for run in runs]))
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in sorted(runs, key=lambda run: sum(each.rpartition(": ")[2] in run.entry.changed for each in keys)):
        found.setdefault(tuple(f"{each}={shown(run.setting(each))}" for each in keys), []).append(run)
    first = next(iter(found))
    chosen = Chosen()
    for parts, group in found.items():
        own = parts if len(keys) == 1 else tuple(part for part in parts if part not in first)
        _add(chosen, ", ".join(own) or ALIKE, group)
    return chosen


def differing(settings: Sequence[Settings]) -> dict[str, list[Any]]:
    """The keys whose values are not the same in all, with the value of each."""
    keys = dict.fromkeys(key for each in settings for key in each)
    values = {key: [each.get(key, ABSENT) for each in settings] for key in keys}
    return {key: found for key, found in values.items() if not all(_same(value, found[0]) for value in found)}


def why_no_pairs(a: Group, b: Group) -> str | None:
    """Why runs of one seed are no pairs in these groups; None: they are."""
    both = [*a.runs, *b.runs]
    for what, prints in (
        ("tokenizer", {run.entry.tokenizer for run in both}),
        ("data", {run.entry.data for run in both}),
    ):
        if len(prints) > 1 or None in prints:
            return f"the ledger does not say of what {what} they are" if None in prints else f"they differ in {what}"
    for key in differing([a.settings, b.settings]):
        own = key.rpartition(": ")[2]
        if any(own == rows or own.startswith(f"{rows}.") for rows in _ROWS):
            return f"they differ in {own}"
    return None if len(a.by_seed.keys() & b.by_seed.keys()) > 1 else "fewer than two seeds are in both"


def shown(value: Any) -> str:
    """A value in a message, as it is typed."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"[{','.join(map(shown, value))}]" if isinstance(value, (list, tuple)) else str(value)


def _add(chosen: Chosen, label: str, runs: Sequence[Run]) -> None:
    if others := differing([run.settings for run in runs]):
        key = next(iter(others))
        value = next(value for value in others[key] if value is not ABSENT)
        parts = [f"{each} ({_values(each, runs)})" for each in others]
        raise UserError(
            f"{label}: its runs differ in more than their seed: {listed(parts, MAX_NAMED)}.",
            f"Choose one value of each, as {key}={shown(value)}; or group by it: by={key}",
        )
    add_group(chosen, label, runs)


def add_group(chosen: Chosen, label: str, runs: Sequence[Run]) -> None:
    """Add runs of the same settings as a group; of those with one seed the last counts."""
    by_seed = {run.seed: run for run in runs}
    if twice := [run.name for run in runs if by_seed[run.seed] is not run]:
        chosen.remarks.append(
            f"{label}: another run has the seed of {listed(twice, MAX_NAMED)}, which says nothing of noise: left out."
        )
    chosen.groups.append(Group(label, tuple(by_seed.values())))


def _all_settings(entry: Entry, last: Mapping[tuple[str, str], Entry], matters: Matters) -> dict[str, Any]:
    """Settings of the stage that matter, and of those before it, of the same run or of the one it started from."""
    found: dict[str, Any] = {}
    for stage in STAGES[: STAGES.index(entry.stage)] if entry.stage in STAGES else ():
        before = last.get((entry.parent_run or entry.run, stage))
        if before is not None and stage != "tokenizer":
            found |= {f"{stage}: {key}": value for key, value in matters(before.settings, stage).items() if key != SEED}
    return found | {key: value for key, value in matters(entry.settings, entry.stage).items() if key != SEED}


def _fitting(name: str, known: Sequence[str]) -> list[str]:
    found = [name] if name in known else fnmatch.filter(known, name)
    if not found:
        begun = fnmatch.filter(known, f"{name}*")
        hint = f"did you mean '{name}*'?" if begun else did_you_mean(name, known) if known else "there are no runs."
        what = "no run fits it" if any(sign in name for sign in "*?[") else "no run of that name"
        raise UserError(f"{name}: {what}; {hint}", "Those that there are: nanochat-pl runs ledger=true")
    return found


def _require_key(key: str, runs: Sequence[Run]) -> None:
    keys = {each.rpartition(": ")[2] for run in runs for each in (*run.settings, *run.entry.settings)}
    if key not in keys:
        stage = runs[0].entry.stage
        raise UserError(f"{key}: no run of stage {stage} has such a setting; {did_you_mean(key, keys)}")


def _values(key: str, runs: Sequence[Run]) -> str:
    return listed(list(dict.fromkeys(shown(run.setting(key)) for run in runs)), MAX_NAMED)


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def _order(stage: str) -> tuple[int, str]:
    return (STAGES.index(stage) if stage in STAGES else len(STAGES), stage)
