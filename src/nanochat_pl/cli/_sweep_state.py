"""What a sweep keeps beside the runs: the numbers of its jobs and their logs; and, while it runs, their states.

``runs/.sweeps/ID/jobs.json`` names the jobs in the order of their numbers, ``NUMBER-NAME.log`` is what a job printed.
ID stands for the command, the swept keys and what names the runs, and not for the values: with one value more it is the
same sweep, in which the old jobs keep their numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nanochat_pl.cli._subprocess import is_stop
from nanochat_pl.cli.runs import is_held, progress_of
from nanochat_pl.common.console import console
from nanochat_pl.common.durations import duration
from nanochat_pl.common.errors import UserError, visible
from nanochat_pl.common.files import ensure_folder, explain_disk_errors, read_object, write_json
from nanochat_pl.common.locks import held_lock, try_lock
from nanochat_pl.common.run_dir import StageFolder, stage_folder

FOLDER = ".sweeps"
LAST_LINES = 8
TAIL_BYTES = 2**14
MAX_ROWS = 16
# What a training whose sweep was killed has to write its resume file, before its job is begun again.
PATIENCE_SECONDS = 60.0


def sweep_folder(runs: Path, identity: Sequence[str]) -> Path:
    """The folder of a sweep, whether it is there yet or not."""
    return runs.absolute() / FOLDER / hashlib.sha256(json.dumps([*identity]).encode()).hexdigest()[:12]


def numbers_of(folder: Path, names: Sequence[str]) -> dict[str, int]:
    """The numbers of the jobs, from 1: those that they have, and the next ones for new jobs, in order."""
    path = ensure_folder(folder) / "jobs.json"
    with held_lock(folder / "lock"):
        jobs = _jobs(path)
        if new := [name for name in names if name not in jobs]:
            jobs += new
            write_json(path, {"jobs": jobs})
    return {name: jobs.index(name) + 1 for name in names}


def runs_of_same_sweep(runs: Path, run: str) -> set[str]:
    """The runs of the sweeps that a run is of, itself too; empty: of none."""
    found = [set(_jobs(path)) for path in (runs / FOLDER).glob("*/jobs.json")]
    return set().union(*(names for names in found if run in names))


def _jobs(path: Path) -> list[str]:
    if not path.exists():
        return []
    fix = "Delete it: the jobs get new numbers, and their runs stay."
    jobs = read_object(path, fix).get("jobs")
    if not isinstance(jobs, list):
        raise UserError(f"{path}: names no jobs.", fix)
    return [str(name) for name in jobs]


def log_of(folder: Path, number: int, name: str) -> Path:
    """What a job prints."""
    return folder / f"{number:03}-{name}.log"


@contextlib.contextmanager
def session(folder: Path) -> Iterator[Path]:
    """A folder for the states of this sweep's jobs while it runs; those of sweeps that were killed are removed.

    A sweep that has not come to its first job leaves nothing behind.
    """
    is_new = not folder.exists()
    with contextlib.ExitStack() as stack:
        with explain_disk_errors(folder), held_lock(ensure_folder(folder) / "lock"):
            for old in folder.glob("session-*"):
                with (old / "lock").open("a", encoding="utf-8") as file:
                    if try_lock(file):
                        shutil.rmtree(old, ignore_errors=True)
            own = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="session-", dir=folder)))
            lock = stack.enter_context((own / "lock").open("a", encoding="utf-8"))
            try_lock(lock)
        try:
            yield own
        finally:
            if is_new and not read_states(own):
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):  # there are other sweeps
                    folder.parent.rmdir()


def write_state(states: Path, number: int, state: dict[str, Any]) -> None:
    """Note what a job does, or has come to."""
    write_json(states / f"{number:06}.json", state)


def read_states(states: Path) -> list[dict[str, Any]]:
    """The states of all jobs that have begun, in the order of their numbers."""
    return [read_object(path, "") for path in sorted(states.glob("*.json"))]


def is_running(state: dict[str, Any]) -> bool:
    """Whether the job has begun and not ended."""
    return "code" not in state


def folders_of(state: dict[str, Any]) -> list[StageFolder]:
    """Where the job leaves what it trains."""
    return [stage_folder(Path(each["runs"]), each["run"], each["stage"]) for each in state["folders"]]


def wait_until_free(folders: Sequence[StageFolder]) -> None:
    """Wait for a training that an earlier sweep has begun and that is about to end; not for ever."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while any(is_held(folder) for folder in folders) and time.monotonic() < deadline:
        time.sleep(0.2)


def summary(states: Sequence[dict[str, Any]], total: int | None) -> str:
    """How far the sweep is: ``3 of 6 done, 1 failed, 1 running, about 2 min left``."""
    ended = [state for state in states if not is_running(state)]
    stopped = sum(is_stop(state["code"]) for state in ended)
    failed, running = sum(bool(state["code"]) for state in ended) - stopped, len(states) - len(ended)
    seconds = [state["seconds"] for state in ended if state["seconds"] and not state["code"]]
    done = f"{len(ended) - failed - stopped:,}{'' if total is None else f' of {total:,}'} done"
    counts = ((failed, "failed"), (stopped, "stopped"), (running, "running"))
    parts = [done, *(f"{count:,} {word}" for count, word in counts if count)]
    if total is not None and seconds and not stopped and (left := total - len(ended)):
        # The parts of running jobs that are done count for half of them.
        jobs = max(left - 0.5 * running, 0.5) / max(running, 1)
        parts.append(f"about {duration(jobs * sum(seconds) / len(seconds))} left")
    return ", ".join(filter(None, parts))


def last_lines(log: Path) -> list[str]:
    """The last lines of what a job printed."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    return [line.rstrip() for line in lines if line.strip()][-LAST_LINES:]


@contextlib.contextmanager
def live_table(states: Path, total: int | None) -> Iterator[None]:
    """Show the states of the jobs while they run, where there is a terminal."""
    terminal = console(stderr=True)
    with Live(
        get_renderable=lambda: _table(states, total),
        console=terminal,
        refresh_per_second=1,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ):
        yield


def _table(folder: Path, total: int | None) -> Group:
    try:
        states = read_states(folder)
    except UserError:  # the sweep says what is wrong; from here it would end the table
        return Group()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "job", "", "step", "time"):
        table.add_column(heading, justify="right" if heading in ("step", "time") else "left")
    order = sorted(states, key=lambda state: (not is_running(state), not state.get("code"), -state["begun"]))
    for state in sorted(order[:MAX_ROWS], key=lambda state: state["number"]):
        running = is_running(state)
        seconds = time.time() - state["begun"] if running else state["seconds"]
        word = "running" if running else state["word"]
        style = "red" if state.get("code") else "" if running else "green"
        cells = [str(state["number"]), state["name"], word, _steps(state), duration(seconds)]
        table.add_row(*(Text(visible(cell), style=style) for cell in cells))
    return Group(Text(summary(states, total)), table)


def _steps(state: dict[str, Any]) -> str:
    """How far the stage is that a job is at."""
    if not is_running(state):
        return ""
    begun = [folder for folder in folders_of(state) if folder.status == "unfinished"]
    try:
        return progress_of(begun[-1]) if begun else ""
    except UserError:  # it is just being written
        return ""
