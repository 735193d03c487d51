"""What a run can be compared with: its own seeds, and the runs whose settings differ from its own in a few."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from nanochat_pl.common.errors import listed
from nanochat_pl.comparison.groups import MAX_NAMED, Chosen, Run, add_group, differing, shown

MAX_KEYS = 3  # in which others may differ
MAX_GROUPS = 6


def neighbours(own: Run, runs: Sequence[Run], related: Collection[str] = ()) -> Chosen:
    """The runs of the same settings as one run, itself among them; and groups of those that differ in a few.

    Args:
        own: the run.
        runs: all of its stage, with or without itself.
        related: names of runs that are comparable whatever they differ in, as those of the same sweep.

    Returns:
        its own group first, then at most :data:`MAX_GROUPS` others, which differ in the fewest settings; nothing where
        there is no other run to compare with.
    """
    alike: list[Run] = []
    others: dict[str, tuple[int, list[Run]]] = {}
    for run in runs:
        keys = differing([own.settings, run.settings])
        if run.name == own.name:
            continue
        if not keys:
            alike.append(run)
        elif len(keys) <= MAX_KEYS or run.name in related:
            label = ", ".join(f"{key}={shown(value)}" for key, (_, value) in keys.items())
            others.setdefault(label, (len(keys), []))[1].append(run)
    chosen = Chosen()
    if not alike and not others:
        return chosen
    seeds = len({run.seed for run in (*alike, own)})
    # The run itself stands last: it counts for its seed, also where a later one has the same.
    add_group(chosen, own.name if seeds == 1 else f"{own.name} ({seeds} seeds)", [*alike, own])
    order = sorted(others.items(), key=lambda each: (each[1][0], -len(each[1][1])))
    for label, (_, found) in order[:MAX_GROUPS]:
        add_group(chosen, label, found)
    if left_out := [run.name for _, (_, found) in order[MAX_GROUPS:] for run in found]:
        names = listed(left_out, MAX_NAMED)
        chosen.remarks.append(f"Not shown, as they differ in more settings or have fewer seeds: {names}.")
    if len(chosen.groups) == 1 and seeds == 1:  # copies of the run alone
        return Chosen()
    return chosen
