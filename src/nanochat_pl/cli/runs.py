"""Lists what has been trained, or deletes a run.

nanochat-pl runs
nanochat-pl runs delete=NAME
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_pl.common.console import print_table, rank_zero_print
from nanochat_pl.common.errors import UserError, did_you_mean, listed
from nanochat_pl.common.files import entries, explain_disk_errors, read_object
from nanochat_pl.common.paths import PathsSettings
from nanochat_pl.common.run_dir import MAX_NAMED, RESULTS, StageFolder, list_runs
from nanochat_pl.common.schema import setting
from nanochat_pl.config.compose import compose

# More than a line of metrics.csv, which has some twenty metrics.
TAIL_BYTES = 2**16


@dataclass(frozen=True)
class RunsConfig:
    """The root of configs/runs.yaml."""

    delete: str | None = setting(None, "Name of a run to delete, with all of its stages.")
    paths: PathsSettings = setting(factory=PathsSettings)


Config = RunsConfig


def run(arguments: Sequence[str]) -> int:
    """The command."""
    config = compose("runs", RunsConfig, arguments).config
    runs = Path(config.paths.runs)
    if config.delete is not None:
        delete_run(runs, config.delete)
        return 0
    rows, damage = [], []
    for folder in itertools.chain.from_iterable(list_runs(runs).values()):
        try:
            rows.append(_row(folder))
        except UserError as error:
            rows.append((folder.run, folder.stage, "damaged", "", "", _size(folder.path)))
            damage += [*error.problems, *filter(None, [error.fix])]
    if rows:
        print_table(("run", "stage", "status", "step", "bits per byte", "MiB"), rows)
    else:
        rank_zero_print(f"{runs}: there are no runs yet.")
    for line in damage:
        rank_zero_print(line)
    return 0


def delete_run(runs: Path, name: str) -> None:
    """Delete a run's folder.

    Raises:
        UserError: there is none; something in it is not of this program; or somebody writes into it.
    """
    known = list_runs(runs)
    if name not in known:
        hint = f"; {did_you_mean(name, known)}" if known else "."
        raise UserError(f"delete={name}: there is no such run in {runs}{hint}")
    folder, size = runs / name, _size(runs / name)
    ours = {stage.stage for stage in known[name]} | set(RESULTS)
    foreign = [path.name for path in entries(folder) if path.name not in ours]
    if foreign and not folder.is_symlink():
        raise UserError(
            f"delete={name}: {folder} also has what nanochat-pl did not write: {listed(foreign, MAX_NAMED)}."
            " Nothing was deleted.",
            "Move that elsewhere, and the same command deletes the run.",
        )
    with contextlib.ExitStack() as stack:
        for stage in known[name]:
            stack.enter_context(stage.locked(patience_seconds=0))
        with explain_disk_errors(folder):
            if folder.is_symlink():
                folder.unlink()
            else:
                _delete_whole(name, folder)
    rank_zero_print(f"{folder}: deleted ({size} MiB).")


def _delete_whole(name: str, folder: Path) -> None:
    """Delete a folder, or nothing of it where the rights to do so are missing somewhere below."""
    fix = f"Give yourself the right to write into it, and run the same command again: chmod -R u+rwX {folder}"
    for at in [str(folder.parent), *(at for at, _, _ in os.walk(folder))]:
        if not os.access(at, os.W_OK | os.X_OK):
            raise UserError(f"delete={name}: {at}: cannot be written. Nothing was deleted.", fix)
    try:
        shutil.rmtree(folder)
    except OSError as error:
        why = error.strerror or error
        raise UserError(
            f"delete={name}: {error.filename or folder}: cannot be deleted: {why}. Part of the run is gone.", fix
        ) from error


def _row(folder: StageFolder) -> tuple[object, ...]:
    if folder.status == "finished":
        finished = folder.finished()
        bits = finished.get("metrics", {}).get("val/bpb")
        return folder.run, folder.stage, "finished", finished.get("step"), _metric(bits), _size(folder.path)
    status = "training" if _is_held(folder) else "unfinished"
    return folder.run, folder.stage, status, _progress(folder), "", _size(folder.path)


def _progress(folder: StageFolder) -> str:
    """How far an unfinished stage is, ``58/150``: by its metrics, else by its resume files; empty: nobody knows."""
    steps = [int(name) for path in folder.checkpoints.glob("step=*.ckpt") if (name := path.stem[5:]).isdigit()]
    step = max([_last_step(folder.path / "metrics.csv"), *steps])
    plan = folder.path / "plan.json"
    steps_planned = read_object(plan).get("num_steps") if plan.is_file() else None
    planned = steps_planned.get("value") if isinstance(steps_planned, dict) else None
    return f"{step}/{planned}" if planned else str(step or "")


def _last_step(metrics: Path) -> int:
    """The step of the last complete line; 0 where there is none. The end of the file may be half a line."""
    if not metrics.is_file():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    cell = lines[-1].partition(b",")[0] if lines else b""
    return int(cell) if cell.isdigit() else 0


def _is_held(folder: StageFolder) -> bool:
    """Whether another process is at it. Where we may not write, nobody can tell."""
    if not os.access(folder.path / "lock", os.W_OK):
        return False
    try:
        with folder.locked(patience_seconds=0):
            return False
    except UserError:
        return True


def _metric(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else ""


def _size(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 2**20:,.1f}"
