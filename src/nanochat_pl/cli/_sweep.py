"""``-m``: one job for each combination of values, with Hydra's sweepers and launchers, each in a process of its own."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from nanochat_pl.cli._subprocess import is_stop, run_child
from nanochat_pl.cli._sweep_state import (
    folders_of,
    is_running,
    last_lines,
    live_table,
    log_of,
    numbers_of,
    read_states,
    session,
    summary,
    sweep_folder,
    wait_until_free,
    write_state,
)
from nanochat_pl.cli.pipeline import begins_anew, check_all, folder_to_run_in, run_folder_of, steps_of
from nanochat_pl.cli.train import compose_train, is_finished, place_of, require_paths, with_parent
from nanochat_pl.common.console import console, ignore_broken_pipe, print_table, rank_zero_print
from nanochat_pl.common.durations import duration
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.run_dir import MAX_NAME_LENGTH, StageFolder, stage_folder
from nanochat_pl.config import hydra_app
from nanochat_pl.config.compose import Composed
from nanochat_pl.config.hydra_app import HydraOptions
from nanochat_pl.config.overrides import split_override, take_key
from nanochat_pl.training.config import TrainConfig

# Launchers whose jobs see the same files; no key: one job after the other.
_ON_THIS_MACHINE = ("", "basic", "joblib", "submitit_local")


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its name and the whole command line after the command."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """What each job of a sweep is told; a launcher may hand it to another process.

    Attributes:
        command: what each job runs.
        typed: the overrides of the sweep, as typed.
        swept: the keys that are swept over.
        total: number of jobs, None where nobody knows it.
        finished: names of the jobs that were finished before.
        folder: of the sweep, with the numbers of its jobs and their logs.
        states: folder in which each job notes what it does and what it has come to.
        process: the one that sweeps.
        shows_table: whether that shows a table of the states; else each job says what it does.
    """

    command: str
    typed: tuple[str, ...]
    swept: tuple[str, ...]
    total: int | None
    finished: frozenset[str]
    folder: Path
    states: Path
    process: int
    shows_table: bool

    def job(self, overrides: Sequence[str]) -> Job:
        """A job, of its overrides as Hydra gives them."""
        return job_of(self.command, hydra_app.to_command_overrides(overrides, TrainConfig, self.typed), self.swept)


class JobFailed(Exception):
    """What a sweeper that looks for the best values is told of a job that has none."""


class Stopped(KeyboardInterrupt):
    """A job was told to stop: no other begins."""


@ignore_broken_pipe()
def run_sweep(command: str, options: HydraOptions) -> int:
    """Run the jobs of a sweep; finished ones are skipped, and one that fails does not stop the others.

    Nor does one that is killed, by the system for its memory for instance; a stop (Ctrl-C, SIGTERM) ends the sweep.

    Returns:
        0, or the exit code of the first job that failed.

    Raises:
        UserError: what is wrong with the jobs, before the first begins; or one was begun under other settings.
    """
    with contextlib.ExitStack() as stack:
        sweep: list[Sweep] = []

        def plan(jobs: list[list[str]] | None, swept: list[str], runs: Path) -> Callable[[Any], float]:
            if jobs is not None and not swept:
                raise UserError("-m: no key has several values.", "Give some: -m model.depth=2,4 or seed=range(0,3)")
            found, finished = _checked(command, options, jobs, swept) if jobs is not None else ([], frozenset())
            total = None if jobs is None else len(jobs)
            # Beside the runs: a job may be on another machine, which shares nothing else with this one.
            folder = sweep_folder(runs, _identity(command, options, swept))
            states = stack.enter_context(session(folder))
            numbers_of(folder, found)
            shows_table = console(stderr=True).is_terminal
            if shows_table:
                stack.enter_context(live_table(states, total))
            typed, process = options.own_overrides, os.getpid()
            sweep.append(Sweep(command, typed, tuple(swept), total, finished, folder, states, process, shows_table))
            return partial(_run_job, sweep[0])

        with contextlib.suppress(JobFailed, Stopped), _terminated_as_interrupted():
            hydra_app.sweep(command, TrainConfig, options, plan)
        states = read_states(sweep[0].states) if sweep else []
    return _tell_outcomes(states, (sweep[0].total or 0) if sweep else 0)


def _tell_outcomes(states: Sequence[dict[str, Any]], total: int) -> int:
    """The table of all jobs, and the last lines of those that failed; gives the exit code."""
    outcomes = [state for state in states if not is_running(state)]
    codes = [int(outcome["code"]) for outcome in outcomes]
    rows = [row for outcome in outcomes for row in _rows(outcome)]
    print_table(("job", "stage", "outcome", "val/bpb", "tokens", "time"), rows)
    for outcome in outcomes:
        if outcome["code"] and not is_stop(outcome["code"]):
            rank_zero_print(f"{outcome['name']}: {outcome['word']}. The end of {outcome['log']}:", style="bold")
            for line in last_lines(Path(outcome["log"])):
                rank_zero_print(f"  {line}")
    if stops := [code for code in codes if is_stop(code)]:
        left = f"{total - len(outcomes):,} of {total:,} jobs were not begun. " if total > len(outcomes) else ""
        rank_zero_print(f"{left}The same command goes on with what is not finished.")
        return stops[0]
    if silent := total - len(outcomes):
        rank_zero_print(f"{silent:,} of {total:,} jobs left no outcome: their launcher says why.")
    return next((code for code in codes if code), 1 if silent > 0 else 0)


def _identity(command: str, options: HydraOptions, swept: Sequence[str]) -> list[str]:
    """What makes it this sweep: the command, what is swept over, and what names the runs."""
    pairs = [split_override(text)[:2] for text in options.own_overrides]
    names = [f"{key}={value}" for key, value in pairs if key in ("run", "experiment", "stage") and key not in swept]
    return [command, *sorted(swept), *sorted(names)]


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A SIGTERM ends a launcher's processes as a Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _checked(
    command: str, options: HydraOptions, jobs: list[list[str]], swept: Sequence[str]
) -> tuple[list[str], frozenset[str]]:
    """Check all jobs before the first begins; gives the names of all, and of those that are finished.

    Raises:
        UserError: something is wrong with a job, or it was begun under other settings.
    """
    found = jobs_of(
        command, [hydra_app.to_command_overrides(job, TrainConfig, options.own_overrides) for job in jobs], swept
    )
    composed = {job.name: _trainings(command, job) for job in found}
    if take_key(options.overrides, "hydra/launcher")[0] in _ON_THIS_MACHINE:
        require_paths([each for of_job in composed.values() for each in of_job])
    finished = set()
    for name, of_job in composed.items():
        if command == "pipeline":
            _require_same_pipeline(of_job)  # which skips its finished steps by itself
        elif _is_finished(of_job[0]):
            finished.add(name)
    return [job.name for job in found], frozenset(finished)


def _trainings(command: str, job: Job) -> list[Composed[TrainConfig]]:
    """The settings of the stages that a job trains."""
    if command == "train":
        return [compose_train(job.overrides)]
    return [each for each in check_all(steps_of(job.overrides)) if isinstance(each.config, TrainConfig)]


def _require_same_pipeline(composed: Sequence[Composed[TrainConfig]]) -> None:
    if not begins_anew(composed):
        for each in composed:
            folder = place_of(each)
            if folder.status != "absent":
                is_finished(folder, with_parent(each, folder))


def jobs_of(command: str, jobs: Sequence[Sequence[str]], swept: Sequence[str]) -> list[Job]:
    """The jobs with their names.

    Raises:
        UserError: with the problems of all jobs together; or jobs that could not be told apart.
    """
    problems: dict[str, None] = {}
    found = []
    for overrides in jobs:
        try:
            found.append(job_of(command, overrides, swept))
        except UserError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise UserError(list(problems), f"Keys and their meaning: nanochat-pl {command} --help")
    names = [job.name for job in found]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"-m: several jobs would be named {', '.join(doubled)}.", "Sweep over values that differ.")
    return found


def job_of(command: str, overrides: Sequence[str], swept: Sequence[str]) -> Job:
    """A job, which is composed and checked for its name: ``base-depth4-matrix_lr0.01``, or what ``run`` says of it."""
    base = (_base_of_pipeline if command == "pipeline" else _base_of_stage)(overrides)
    pairs = [split_override(text)[:2] for text in overrides]
    varied = [(key, value) for key, value in pairs if key in swept]
    others = [text for text in overrides if split_override(text)[0] != "run"]
    name = _name(base, [(key, value) for key, value in varied if key not in ("run", "experiment")])
    return Job(name, (*others, f"run={name}"))


def _run_job(sweep: Sweep, config: Any) -> float:
    """One job, called by Hydra's launcher: in this process, or in one of its own on this machine or another.

    Returns:
        bits per byte at the end; NaN where it was not measured.
    """
    job = sweep.job(hydra_app.current_overrides())
    number = numbers_of(sweep.folder, [job.name])[job.name]
    log = log_of(sweep.folder, number, job.name)
    folders = _stage_folders(sweep.command, job)  # now: after the job, resume=never would mean yet another one
    places = [{"runs": str(each.runs.absolute()), "run": each.run, "stage": each.stage} for each in folders]
    before = job.name in sweep.finished
    state: dict[str, Any] = {"number": number, "name": job.name, "begun": time.time(), "log": str(log)}
    write_state(sweep.states, number, state := {**state, "folders": places})
    _say(sweep, f"job {number}: {job.name}{': finished before' if before else f', its log is {log}'}", style="bold")
    parent = sweep.process if os.getppid() == sweep.process else None  # of a process that the launcher has started
    wait_until_free(folders)
    code = 0 if before else run_child([sweep.command, *job.overrides], parent, log)
    word = "finished before" if before else _outcome(code)
    seconds = 0.0 if before else time.time() - state["begun"]
    write_state(sweep.states, number, {**state, "code": code, "word": word, "seconds": seconds})
    bits = [each.finished().get("metrics", {}).get("val/bpb") for each in folders if each.status == "finished"]
    value = next((float(value) for value in reversed(bits) if value is not None), float("nan"))
    if not before:
        measured = "" if math.isnan(value) or code else f", val/bpb {value:.4f}"
        _say(sweep, f"job {number}: {word}{measured}; {summary(read_states(sweep.states), sweep.total)}")
    if is_stop(code):
        raise Stopped
    if code and sweep.total is None:
        raise JobFailed(f"{job.name}: {_outcome(code)}")
    return value


def _say(sweep: Sweep, text: str, style: str = "") -> None:
    if not sweep.shows_table:
        rank_zero_print(text, style=style)


def _outcome(code: int) -> str:
    if is_stop(code):
        return "stopped"
    if code <= 128:
        return "finished" if code == 0 else f"failed, exit code {code}"
    number = code - 128
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"killed, {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _rows(outcome: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table: one for each stage that is finished, and one for a job that has none or failed."""
    name, word = outcome["name"], outcome["word"]
    rows = [_metrics(folder) for folder in folders_of(outcome) if folder.status == "finished"]
    if not rows or not word.startswith("finished"):
        return [(name, "", word, "", "", ""), *((name, stage, "finished", *rest) for stage, *rest in rows)]
    return [(name, stage, word, *rest) for stage, *rest in rows]


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


def _stage_folders(command: str, job: Job) -> list[StageFolder]:
    """Where a job leaves what it trains."""
    if command == "train":
        return [place_of(compose_train(job.overrides), tell=lambda text: None)]
    steps = steps_of(job.overrides)
    run_dir = folder_to_run_in(check_all(steps))
    return [stage_folder(run_dir.parent, run_dir.name, step.name) for step in steps if step.command == "train"]


def _is_finished(composed: Composed[TrainConfig]) -> bool:
    if composed.config.resume == "never":
        return False
    return is_finished(place_of(composed), composed)


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


def _name(base: str, pairs: Sequence[tuple[str, str]]) -> str:
    """The last part of each swept key and its value behind the base, in signs that a name may have."""
    pairs = [(key, _short(value)) for key, value in pairs]
    short = [key.rpartition(".")[2] for key, _ in pairs]
    parts = [
        (key if short.count(last) > 1 else last) + value
        for (key, value), last in zip(pairs, short, strict=True)
        if not (key == "model.depth" and base == f"d{value}")
    ]
    return re.sub(r"[^\w.+-]+", "_", "-".join([base, *parts]))[:MAX_NAME_LENGTH]


def _short(value: str) -> str:
    """A number that has many digits, 20000000000.0, in the form in which it has few, 2e+10."""
    try:
        short = f"{float(value):g}"
        return short if len(short) < len(value) and float(short) == float(value) else value
    except ValueError:
        return value
