"""Lists what has been trained: the folders that are there, or what the ledger knows; or deletes a run.

nanochat-pl runs
nanochat-pl runs stage=base where="model.depth>=4 and val/bpb<1.2" sort=val/bpb
nanochat-pl runs 'columns=[run,model.depth,val/bpb,errors.val/bpb]' format=csv
nanochat-pl runs delete=NAME
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat_pl.common.console import print_table, rank_zero_print
from nanochat_pl.common.errors import UserError, did_you_mean, listed
from nanochat_pl.common.files import entries, explain_disk_errors, read_object
from nanochat_pl.common.paths import PathsSettings
from nanochat_pl.common.run_dir import MAX_NAMED, RESULTS, StageFolder, list_runs
from nanochat_pl.common.schema import setting
from nanochat_pl.config.compose import compose
from nanochat_pl.ledger import Entry, newest, read_ledger
from nanochat_pl.ledger.query import Row, ordered, require_columns, select, usual_columns

# More than a line of metrics.csv, which has some twenty metrics.
TAIL_BYTES = 2**16
HEADING_WIDTH = 18  # characters: of a longer name of a column there are several lines


@dataclass(frozen=True)
class RunsConfig:
    """The root of configs/runs.yaml."""

    delete: str | None = setting(None, "Name of a run to delete, with all of its stages; the ledger keeps its lines.")
    ledger: bool = setting(
        False, "List what the ledger knows, deleted runs too, and not the folders. The keys below imply it."
    )
    stage: str | None = setting(None, "Entries of this stage.")
    where: str | None = setting(None, "Entries of which this is so: NAME OPERATOR VALUE, several joined by and.")
    sort: str | None = setting(None, "Column to sort by; -NAME: the highest first; null: in the order of time.")
    columns: list[str] | None = setting(
        None,
        "Columns by name: settings, metrics, best.METRIC, errors.METRIC, inference.NAME, machine.NAME, git.commit;"
        " null: the usual ones and the settings that differ.",
    )
    format: Literal["table", "csv", "json"] = setting("table", "What is printed; json without columns: whole entries.")
    history: bool = setting(False, "All entries; false: of each stage of a run the newest.")
    paths: PathsSettings = setting(factory=PathsSettings)

    @staticmethod
    def explain_unknown(key: str, value: object) -> str | None:
        """The name of a run is a condition on the ledger here, and a key of most other commands."""
        return f": there is no such key; the entries of a run: where=run={value}." if key == "run" else None

    @property
    def reads_ledger(self) -> bool:
        """Whether the ledger is asked for."""
        asked = (self.stage, self.where, self.sort, self.columns)
        return self.ledger or self.history or self.format != "table" or any(key is not None for key in asked)


Config = RunsConfig


def run(arguments: Sequence[str]) -> int:
    """The command."""
    config = compose("runs", RunsConfig, arguments).config
    runs = Path(config.paths.runs)
    if config.delete is not None:
        if config.reads_ledger:
            raise UserError(
                f"delete={config.delete}: deletes a run with all its stages; keys that choose have no meaning here.",
                "Leave stage, where, sort, columns, history, ledger and format out.",
            )
        delete_run(runs, config.delete)
        return 0
    if config.reads_ledger:
        _print_ledger(config, runs)
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


def _print_ledger(config: RunsConfig, runs: Path) -> None:
    from nanochat_pl.cli.run_record import settings_that_matter  # with torch, which takes seconds to import

    entries = read_ledger(runs)
    if not config.history:
        entries = newest(entries)
    if not entries:
        print(f"{runs}: the ledger has no entries yet.", file=sys.stdout if config.format == "table" else sys.stderr)
        return
    rows = [_row_of(entry, runs) for entry in entries if config.stage in (None, entry.stage)]
    if not rows:
        stages = {entry.stage for entry in entries}
        raise UserError(
            f"stage={config.stage}: the ledger has no such stage; {did_you_mean(str(config.stage), stages)}"
        )
    require_columns(config.columns or [], rows, "columns")
    if config.where is not None:
        rows = select(rows, config.where)
    if config.sort is not None:
        rows = ordered(rows, config.sort)
    columns, more = config.columns, list[str]()
    if columns is None:
        columns, more = usual_columns([row.entry for row in rows], settings_that_matter)
    if config.format == "json":
        whole = config.columns is None
        found = [
            row.entry.to_plain() | {"exit": row.cells["exit"]}
            if whole
            else {name: row.cells.get(name) for name in columns}
            for row in rows
        ]
        print(json.dumps(found, indent=2, ensure_ascii=False))
    elif config.format == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([[row.cells.get(name) for name in columns] for row in rows])
    elif not rows:
        rank_zero_print(f"where={config.where}: true of no entry of the ledger.")
    else:
        cells = [
            [
                _setting(row.cells.get(name)) if name in row.entry.settings else _shown(name, row.cells.get(name))
                for name in columns
            ]
            for row in rows
        ]
        print_table([_heading(name) for name in columns], cells)
        if more:
            rank_zero_print(f"These differ, too (columns=[…] shows them): {listed(more, MAX_NAMED)}")


def _row_of(entry: Entry, runs: Path) -> Row:
    """An entry; of one that has only begun it is said whether its process is at it or was killed."""
    row = Row.of(entry)
    if entry.exit != "started":
        return row
    is_running = is_held(StageFolder(runs, entry.run, entry.stage, entry.run))
    return Row(entry, {**row.cells, "exit": "running" if is_running else "killed"})


def _heading(name: str) -> str:
    """A column's name in lines that end where one of its parts does."""
    lines = [""]
    for part in re.findall(r"[^./_]*[./_]|[^./_]+", name):
        if lines[-1] and len(lines[-1]) + len(part) > HEADING_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _setting(value: object) -> str:
    """A setting as one types it, with six digits."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown(column: str, value: object) -> str:
    """A value as a table has it: the files have all of its digits."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if column == "seconds":
        return f"{value:,.1f}"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"
    return (
        f"{int(value):,}" if column in ("steps", "tokens") else f"{value:g}" if abs(value) >= 1e9 else f"{int(value)}"
    )


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
    status = "training" if is_held(folder) else "unfinished"
    return folder.run, folder.stage, status, progress_of(folder), "", _size(folder.path)


def progress_of(folder: StageFolder) -> str:
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


def is_held(folder: StageFolder) -> bool:
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
