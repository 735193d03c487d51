"""``-m``: one job for each combination of the values that keys are swept over, each in a process of its own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_pl.cli.child import run_child
from nanochat_pl.cli.overrides import parse_sweeps
from nanochat_pl.common.console import print_table, say
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.run_folder import MAX_NAME_LENGTH
from nanochat_pl.training.settings import TrainConfig

MAX_JOBS = 1_000


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its name and the whole command line after the verb."""

    name: str
    overrides: tuple[str, ...]


def run_sweep(verb: str, arguments: Sequence[str]) -> int:
    """Run the jobs of a sweep one after the other. All are checked before the first begins; a failing one does not
    keep the others from running. Finished jobs are skipped by themselves when the sweep is run again.

    Returns:
        0, or the exit code of the first job that failed; a signal ends the whole sweep.
    """
    from nanochat_pl.cli.train import compose_train, place_of

    jobs = expand(arguments)
    problems: dict[str, None] = {}
    for job in jobs:
        try:
            compose_train(job.overrides)
        except UserError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise UserError(list(problems), f"Keys and their meaning: nanochat-pl {verb} --help")
    outcomes, first_failure = [], 0
    for n, job in enumerate(jobs, start=1):
        say(f"job {n} of {len(jobs)}: {job.name}", style="bold")
        if verb == "train" and place_of(compose_train(job.overrides)).status == "finished":
            outcomes.append((job.name, "finished before"))
            continue
        code = run_child([verb, *job.overrides])
        if code >= 128:
            return code
        first_failure = first_failure or code
        outcomes.append((job.name, "finished" if code == 0 else f"failed, exit code {code}"))
    print_table(("job", "outcome"), outcomes)
    return first_failure


def expand(arguments: Sequence[str]) -> list[Job]:
    """The jobs of a sweep, in the order of the values as written, the last key varying fastest."""
    problems: list[str] = []
    swept, rest = parse_sweeps(arguments, TrainConfig, problems)
    if problems:
        raise UserError(problems)
    if not swept:
        raise UserError("-m: no key has several values.", "Give some: -m model.depth=2,4 or optim.matrix_lr=0.01,0.02")
    combinations = list(itertools.product(*(key.texts for key in swept)))
    if len(combinations) > MAX_JOBS:
        raise UserError(f"-m: makes {len(combinations):,} jobs, more than {MAX_JOBS:,}.")
    names = [_name(_base_name(rest, combination), combination) for combination in combinations]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(f"-m: several jobs would be named {', '.join(doubled)}.", "Sweep over values that differ.")
    others = [text for text in rest if not text.startswith("run=")]
    return [
        Job(name, (*others, *combination, f"run={name}")) for name, combination in zip(names, combinations, strict=True)
    ]


def _base_name(rest: Sequence[str], combination: Sequence[str]) -> str:
    from nanochat_pl.cli.train import compose_train

    composed = compose_train([*rest, *combination])
    return composed.config.run or composed.experiment or "sweep"


def _name(base: str, combination: Sequence[str]) -> str:
    """``base-depth4-matrix_lr0.01``: the last part of each swept key and its value, in signs that a name may have."""
    keys = [text.partition("=")[0] for text in combination]
    short = [key.rpartition(".")[2] for key in keys]
    parts = [
        (key if short.count(last) > 1 else last) + text.partition("=")[2]
        for key, last, text in zip(keys, short, combination, strict=True)
    ]
    return re.sub(r"[^\w.+-]+", "_", "-".join([base, *parts]))[:MAX_NAME_LENGTH]
