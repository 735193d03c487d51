"""``-m``: one job for each combination of the values that keys are swept over, each in a process of its own."""

from __future__ import annotations

import itertools
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_pl.cli._subprocess import is_stop, run_child
from nanochat_pl.cli.pipeline import check_all, folder_to_run_in, run_folder_of, steps_of
from nanochat_pl.cli.train import compose_train, is_finished, place_of
from nanochat_pl.common.console import ignore_broken_pipe, print_table, rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.run_dir import MAX_NAME_LENGTH, StageFolder, stage_folder
from nanochat_pl.config.compose import Composed
from nanochat_pl.config.overrides import parse_sweeps
from nanochat_pl.report.format import duration
from nanochat_pl.training.config import TrainConfig

MAX_JOBS = 1_000


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its name and the whole command line after the command."""

    name: str
    overrides: tuple[str, ...]


@ignore_broken_pipe()
def run_sweep(command: str, arguments: Sequence[str]) -> int:
    """Run the jobs of a sweep one after the other, finished ones are skipped; one that fails does not stop the others.

    Nor does one that is killed, by the system for its memory for instance; a stop (Ctrl-C, SIGTERM) ends the sweep.

    Returns:
        0, or the exit code of the first job that failed.

    Raises:
        UserError: what :func:`expand` says; or a job was begun under other settings.
    """
    jobs, first_failure = expand(arguments, command), 0
    rows: list[tuple[str, ...]] = []
    composed = {job.name: compose_train(job.overrides) for job in jobs} if command == "train" else {}
    finished = {name for name, each in composed.items() if _is_finished(each)}
    for n, job in enumerate(jobs, start=1):
        rank_zero_print(f"job {n} of {len(jobs)}: {job.name}", style="bold")
        # Now: after the job, resume=never would mean yet another one.
        folders = [place_of(composed[job.name], tell=lambda text: None)] if command == "train" else _stage_folders(job)
        if job.name in finished:
            rows += _rows(job, "finished before", folders)
            continue
        code = run_child([command, *job.overrides])
        if is_stop(code):
            return code
        first_failure = first_failure or code
        rows += _rows(job, _outcome(code), folders)
    print_table(("job", "stage", "outcome", "val/bpb", "tokens", "time"), rows)
    return first_failure


def _outcome(code: int) -> str:
    if code <= 128:
        return "finished" if code == 0 else f"failed, exit code {code}"
    number = code - 128
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"killed, {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _rows(job: Job, outcome: str, folders: Sequence[StageFolder]) -> list[tuple[str, ...]]:
    """Rows of the table: one for each stage that is finished, and one for a job that has none or failed."""
    rows = [_metrics(folder) for folder in folders if folder.status == "finished"]
    if not rows or not outcome.startswith("finished"):
        return [(job.name, "", outcome, "", "", ""), *((job.name, stage, "finished", *rest) for stage, *rest in rows)]
    return [(job.name, stage, outcome, *rest) for stage, *rest in rows]


def _metrics(folder: StageFolder) -> tuple[str, str, str, str]:
    """Stage, bits per byte, tokens and time, empty where finished.json does not say."""
    finished = folder.finished()
    bits, tokens, seconds = finished.get("metrics", {}).get("val/bpb"), finished.get("tokens"), finished.get("seconds")
    return (
        folder.stage,
        "" if bits is None else f"{bits:.4f}",
        "" if tokens is None else f"{tokens:,}",
        "" if seconds is None else duration(seconds),
    )


def _stage_folders(job: Job) -> list[StageFolder]:
    """Where a pipeline leaves what it trains."""
    steps = steps_of(job.overrides)
    run_dir = folder_to_run_in(check_all(steps))
    return [stage_folder(run_dir.parent, run_dir.name, step.name) for step in steps if step.command == "train"]


def _is_finished(composed: Composed[TrainConfig]) -> bool:
    if composed.config.resume == "never":
        return False
    return is_finished(place_of(composed), composed)


def expand(arguments: Sequence[str], command: str = "train") -> list[Job]:
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
    names = _checked_names(command, rest, combinations)
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(f"-m: several jobs would be named {', '.join(doubled)}.", "Sweep over values that differ.")
    others = [text for text in rest if not text.startswith("run=")]
    return [
        Job(name, (*others, *combination, f"run={name}")) for name, combination in zip(names, combinations, strict=True)
    ]


def _checked_names(command: str, rest: Sequence[str], combinations: Sequence[Sequence[str]]) -> list[str]:
    """The name of each job; all of them are composed and checked for it, before the first begins."""
    problems: dict[str, None] = {}
    names = []
    for combination in combinations:
        try:
            check = _base_of_pipeline if command == "pipeline" else _base_of_stage
            names.append(_name(check([*rest, *combination]), combination))
        except UserError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise UserError(list(problems), f"Keys and their meaning: nanochat-pl {command} --help")
    return names


def _base_of_pipeline(overrides: Sequence[str]) -> str:
    return run_folder_of(check_all(steps_of(overrides))).name


def _base_of_stage(overrides: Sequence[str]) -> str:
    composed = compose_train(overrides)
    if composed.config.stage.definition.starts_from_model:
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
