"""``-m``: one job for each combination of the values that keys are swept over, each in a process of its own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_pl.cli.child import run_child
from nanochat_pl.cli.overrides import parse_sweeps
from nanochat_pl.cli.pipeline import check_all, run_folder_of, steps_of
from nanochat_pl.cli.train import compose_train, is_finished, place_of
from nanochat_pl.common.console import output_may_end, print_table, say
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.run_folder import MAX_NAME_LENGTH
from nanochat_pl.training.settings import TrainConfig

MAX_JOBS = 1_000


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its name and the whole command line after the verb."""

    name: str
    overrides: tuple[str, ...]


@output_may_end()
def run_sweep(verb: str, arguments: Sequence[str]) -> int:
    """Run the jobs of a sweep one after the other, finished ones are skipped; one that fails does not stop the others.

    Returns:
        0, or the exit code of the first job that failed; a signal ends the whole sweep.

    Raises:
        UserError: what :func:`expand` says; or a job was begun under other settings.
    """
    jobs, outcomes, first_failure = expand(arguments, verb), [], 0
    finished = {job.name for job in jobs if verb == "train" and _is_finished(job)}
    for n, job in enumerate(jobs, start=1):
        say(f"job {n} of {len(jobs)}: {job.name}", style="bold")
        if job.name in finished:
            outcomes.append((job.name, "finished before"))
            continue
        code = run_child([verb, *job.overrides])
        if code >= 128:
            return code
        first_failure = first_failure or code
        outcomes.append((job.name, "finished" if code == 0 else f"failed, exit code {code}"))
    print_table(("job", "outcome"), outcomes)
    return first_failure


def _is_finished(job: Job) -> bool:
    composed = compose_train(job.overrides)
    if composed.config.resume == "never":
        return False
    return is_finished(place_of(composed), composed)


def expand(arguments: Sequence[str], verb: str = "train") -> list[Job]:
    """The jobs of a sweep, in the order of the values as written, the last key varying fastest.

    Raises:
        UserError: with the problems of all jobs together; or jobs that could not be told apart.
    """
    problems: list[str] = []
    swept, rest = parse_sweeps(arguments, TrainConfig, problems)
    if problems:
        raise UserError(problems)
    if not swept:
        raise UserError("-m: no key has several values.", "Give some: -m model.depth=2,4 or optim.matrix_lr=0.01,0.02")
    combinations = list(itertools.product(*(key.texts for key in swept)))
    if len(combinations) > MAX_JOBS:
        raise UserError(f"-m: makes {len(combinations):,} jobs, more than {MAX_JOBS:,}.")
    names = _checked_names(verb, rest, combinations)
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(f"-m: several jobs would be named {', '.join(doubled)}.", "Sweep over values that differ.")
    others = [text for text in rest if not text.startswith("run=")]
    return [
        Job(name, (*others, *combination, f"run={name}")) for name, combination in zip(names, combinations, strict=True)
    ]


def _checked_names(verb: str, rest: Sequence[str], combinations: Sequence[Sequence[str]]) -> list[str]:
    """The name of each job; all of them are composed and checked for it, before the first begins."""
    problems: dict[str, None] = {}
    names = []
    for combination in combinations:
        try:
            check = _base_of_pipeline if verb == "pipeline" else _base_of_stage
            names.append(_name(check([*rest, *combination]), combination))
        except UserError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise UserError(list(problems), f"Keys and their meaning: nanochat-pl {verb} --help")
    return names


def _base_of_pipeline(overrides: Sequence[str]) -> str:
    return run_folder_of(check_all(steps_of(overrides))).name


def _base_of_stage(overrides: Sequence[str]) -> str:
    composed = compose_train(overrides)
    if composed.config.stage.trains_on_conversations:
        raise UserError(
            f"-m: the stage {composed.config.stage.name} builds on another stage of its run; sweep over a pipeline,"
            " which trains both: nanochat-pl pipeline experiment=NAME -m stages.sft.KEY=VALUE,VALUE"
        )
    return composed.config.run or composed.experiment or f"d{composed.config.model.depth}"


def _name(base: str, combination: Sequence[str]) -> str:
    """``base-depth4-matrix_lr0.01``: the last part of each swept key and its value, in signs that a name may have."""
    pairs = [text.partition("=")[::2] for text in combination]
    short = [key.rpartition(".")[2] for key, _ in pairs]
    parts = [
        (key if short.count(last) > 1 else last) + value
        for (key, value), last in zip(pairs, short, strict=True)
        if not (key == "model.depth" and base == f"d{value}")
    ]
    return re.sub(r"[^\w.+-]+", "_", "-".join([base, *parts]))[:MAX_NAME_LENGTH]
