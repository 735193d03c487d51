"""``-m``: one job for each combination of values, with Hydra's sweepers and launchers, each in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from nanochat_pl.cli._subprocess import is_stop, run_child
from nanochat_pl.cli.pipeline import check_all, folder_to_run_in, run_folder_of, steps_of
from nanochat_pl.cli.train import compose_train, is_finished, place_of
from nanochat_pl.common.console import ignore_broken_pipe, print_table, rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import explain_disk_errors, read_object, write_json
from nanochat_pl.common.run_dir import MAX_NAME_LENGTH, StageFolder, stage_folder
from nanochat_pl.config import hydra_app
from nanochat_pl.config.compose import Composed
from nanochat_pl.config.hydra_app import HydraOptions
from nanochat_pl.config.overrides import split_override
from nanochat_pl.report.format import duration
from nanochat_pl.training.config import TrainConfig


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
        outcomes: folder in which each job notes its name, command line and exit code.
        process: the one that sweeps.
    """

    command: str
    typed: tuple[str, ...]
    swept: tuple[str, ...]
    total: int | None
    finished: frozenset[str]
    outcomes: Path
    process: int

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
            finished = _checked(command, options, jobs, swept) if jobs is not None else frozenset()
            total = None if jobs is None else len(jobs)
            # Beside the runs: a job may be on another machine, which shares nothing else with this one.
            with explain_disk_errors(runs):
                runs.mkdir(parents=True, exist_ok=True)
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".sweep-", dir=runs.absolute()))
            sweep.append(
                Sweep(command, options.own_overrides, tuple(swept), total, finished, Path(folder), process=os.getpid())
            )
            return partial(_run_job, sweep[0])

        with contextlib.suppress(JobFailed, Stopped), _terminated_as_interrupted():
            hydra_app.sweep(command, TrainConfig, options, plan)
        outcomes = [read_object(path, "") for path in sorted(sweep[0].outcomes.iterdir())] if sweep else []
        total = (sweep[0].total or 0) if sweep else 0
    codes = [int(outcome["code"]) for outcome in outcomes]
    rows = [row for outcome in outcomes for row in _rows(outcome)]
    print_table(("job", "stage", "outcome", "val/bpb", "tokens", "time"), rows)
    if stops := [code for code in codes if is_stop(code)]:
        left = f"{total - len(outcomes):,} of {total:,} jobs were not begun. " if total > len(outcomes) else ""
        rank_zero_print(f"{left}The same command goes on with what is not finished.")
        return stops[0]
    if silent := total - len(outcomes):
        rank_zero_print(f"{silent:,} of {total:,} jobs left no outcome: their launcher says why.")
    return next((code for code in codes if code), 1 if silent > 0 else 0)


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


def _checked(command: str, options: HydraOptions, jobs: list[list[str]], swept: Sequence[str]) -> frozenset[str]:
    """Check all jobs before the first begins; gives the names of those that are finished."""
    found = jobs_of(
        command, [hydra_app.to_command_overrides(job, TrainConfig, options.own_overrides) for job in jobs], swept
    )
    if command != "train":
        return frozenset()  # a pipeline skips its finished steps by itself
    return frozenset(job.name for job in found if _is_finished(compose_train(job.overrides)))


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
    number, overrides = hydra_app.current_job()
    job = sweep.job(overrides)
    of = "" if sweep.total is None else f" of {sweep.total}"
    rank_zero_print(f"job {number}{of}: {job.name}", style="bold")
    folders = _stage_folders(sweep.command, job)  # now: after the job, resume=never would mean yet another one
    before = job.name in sweep.finished
    parent = sweep.process if os.getppid() == sweep.process else None  # of a process that the launcher has started
    code = 0 if before else run_child([sweep.command, *job.overrides], parent)
    places = [{"runs": str(each.runs.absolute()), "run": each.run, "stage": each.stage} for each in folders]
    word = "finished before" if before else _outcome(code)
    outcome = {"name": job.name, "code": code, "word": word, "folders": places}
    write_json(sweep.outcomes / f"{number:06}.json", outcome)
    if is_stop(code):
        raise Stopped
    bits = [each.finished().get("metrics", {}).get("val/bpb") for each in folders if each.status == "finished"]
    if code and sweep.total is None:
        raise JobFailed(f"{job.name}: {_outcome(code)}")
    return next((float(value) for value in reversed(bits) if value is not None), float("nan"))


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
    folders = [stage_folder(Path(each["runs"]), each["run"], each["stage"]) for each in outcome["folders"]]
    rows = [_metrics(folder) for folder in folders if folder.status == "finished"]
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
    short = [key.rpartition(".")[2] for key, _ in pairs]
    parts = [
        (key if short.count(last) > 1 else last) + value
        for (key, value), last in zip(pairs, short, strict=True)
        if not (key == "model.depth" and base == f"d{value}")
    ]
    return re.sub(r"[^\w.+-]+", "_", "-".join([base, *parts]))[:MAX_NAME_LENGTH]
