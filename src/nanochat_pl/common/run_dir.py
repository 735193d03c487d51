"""Folders of runs: ``<runs>/<run>/<stage>/``. Their names, their lock, what is in them.

Names are deterministic, so the same command finds its own folder again. ``finished.json`` is written last: a stage is
finished when it is there and not before.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from nanochat_pl.common.errors import UserError, did_you_mean, listed
from nanochat_pl.common.files import (
    ensure_folder,
    entries,
    explain_disk_errors,
    is_leftover,
    read_object,
    remove_leftovers,
    whole_lines,
    write_bytes,
    write_json,
)
from nanochat_pl.common.locks import try_lock
from nanochat_pl.common.text_files import read_bytes
from nanochat_pl.common.user_code import UserCodeError

# Stages in the order in which a model goes through them. One of anybody's own comes after that which it started from.
STAGES = ("tokenizer", "base", "mid", "sft", "rl")
# What else commands write into the folder of a run.
RESULTS = ("evaluation", "report")
# Of these a stage's folder has one as soon as it is locked, or imported, or copied from elsewhere.
_RECORDS = ("lock", "about.json", "finished.json")
# Of these a folder has one that is a stage whatever its name.
_OWN_RECORDS = ("overrides.txt", "bundle/stage.json")
# Folders beside runs, or in them, by which paths are told apart.
RESERVED = (*STAGES, *RESULTS, "doctor")
LOCK_PATIENCE_SECONDS = 5.0
SHARED_RUNS = "All nodes need the same folder of runs: set paths.runs=… to one on a disk that they share."
MAX_NAME_LENGTH = 200
MAX_NAMED = 8  # files that are not ours
_MAX_RECORD_BYTES = 2**20

Status = Literal["absent", "unfinished", "finished"]


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage of a run.

    Attributes:
        runs: folder of all runs.
        run: name of the run.
        stage: name of the stage.
        parent_run: the run whose earlier stages this one starts from; the same run, unless ``resume=never`` began a
            new one.
    """

    runs: Path
    run: str
    stage: str
    parent_run: str

    @property
    def path(self) -> Path:
        return self.runs / self.run / self.stage

    @property
    def bundle(self) -> Path:
        return self.path / "bundle"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def chosen_files(self) -> Path:
        """Which files of data sets of a hub the stage was begun with."""
        return self.path / "data.json"

    @property
    def chosen_corpus(self) -> Path:
        """Which corpus of docstrings the stage was begun with."""
        return self.path / "corpus.json"

    @property
    def chosen_source(self) -> Path:
        """What data=auto came to when the stage was begun."""
        return self.path / "data_choice.json"

    @property
    def status(self) -> Status:
        with _looking_into(self.runs):
            if (self.path / "finished.json").is_file():
                return "finished"
            return "unfinished" if self.path.is_dir() else "absent"

    def parent(self, stage: str) -> StageFolder:
        """The folder of an earlier stage that this one builds on."""
        return stage_folder(self.runs, self.parent_run, stage)

    def finished(self) -> dict[str, Any]:
        """What ``finished.json`` says: step, metrics, seconds. Raises :class:`UserError` where it is damaged."""
        path = self.path / "finished.json"
        fix = "Bring it back from a copy; or delete it, and the command that trained the stage finishes it again."
        finished = read_object(path, fix)
        if not isinstance(finished.get("metrics", {}), dict):
            raise UserError(
                f"{path}: its metrics are no group of named metrics but {type(finished['metrics']).__name__}.", fix
            )
        return finished

    def create(self) -> None:
        """Make the folder, prove that it can be written, and note a parent in another run.

        Raises:
            UserError: it cannot be written, or has files and no record of a stage: they are somebody else's.
        """
        ensure_folder(self.path)
        names = [path.name for path in entries(self.path) if not is_leftover(path)]
        if names and not _has_one(self.path, (*_RECORDS, "parent.json", *_OWN_RECORDS)):
            raise UserError(
                f"{self.path}: is no folder of a stage, and is not empty: {listed(names, MAX_NAMED)}.",
                "Move that elsewhere, or give this run another name with run=NEW.",
            )
        if self.parent_run != self.run:
            write_json(self.path / "parent.json", {"run": self.parent_run})

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Leave the folder as it was if what is done inside is refused: new files go, records get their old contents.

        Where nothing is left but the lock, the folder goes too (and the run's, where nothing else is in it). A training
        that has begun is kept, whatever ended it: its metrics tell why. A class of the user's that fails before the
        first metrics has only begun the file of them.
        """
        metrics = self.path / "metrics.csv"
        # Not the lock: to close it once more would let go of it.
        kept = {path for path in self.path.glob("*") if path.name != "lock"}
        before = {path: _record(path) if path in kept else None for path in self.path.rglob("*")}
        num_lines = _num_lines(metrics)
        try:
            yield
        except UserError as error:
            # Of a class of the user's, the names of the columns alone are no beginning.
            if _num_lines(metrics) > (max(num_lines, 1) if isinstance(error, UserCodeError) else num_lines):
                raise
            for path in sorted(set(self.path.rglob("*")).difference(before), reverse=True):  # what is in a folder first
                with contextlib.suppress(OSError):
                    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            for path, content in before.items():
                if content is not None and _record(path) != content:
                    write_bytes(path, content)
            marks = [self.path / "parent.json", self.path / "lock"]
            with contextlib.suppress(OSError):  # other stages are in it, or it is a link
                if set(self.path.rglob("*")).issubset(marks):
                    for path in marks:
                        path.unlink(missing_ok=True)
                    self.path.rmdir()
                    self.path.parent.rmdir()
            raise

    @contextlib.contextmanager
    def locked(self, patience_seconds: float = LOCK_PATIENCE_SECONDS) -> Iterator[None]:
        """Hold the folder for one writer. The operating system lets go of it however the process ends.

        Args:
            patience_seconds: how long to wait for a writer that is just about to end.

        Raises:
            UserError: another process holds it; the message names the process.
        """
        path = self.path / "lock"
        deadline = time.monotonic() + patience_seconds
        while True:
            with explain_disk_errors(path):
                self.path.mkdir(parents=True, exist_ok=True)
                file = path.open("a+", encoding="utf-8")
            while not try_lock(file):
                if time.monotonic() >= deadline:
                    file.close()
                    raise UserError(
                        f"{self.path}: is in use by {_holder(path)}.",
                        "Wait until it ends or stop it; or give this run another name with run=NEW.",
                    )
                time.sleep(0.1)
            if _is_there(file, path):
                break
            file.close()  # who held it has removed it: others would lock another file
        with file:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            remove_leftovers(self.path)
            yield


def _is_there(file: IO[str], path: Path) -> bool:
    """Whether the path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def stage_folder(runs: Path, run: str, stage: str) -> StageFolder:
    """The folder of a stage, whether it exists or not. Raises :class:`UserError` for a name that cannot be a run's."""
    check_name(run)
    return _stage_folder(runs, run, stage)


def _stage_folder(runs: Path, run: str, stage: str) -> StageFolder:
    note = runs / run / stage / "parent.json"
    parent_run = run
    with _looking_into(runs):
        noted = note.is_file()
    if noted:
        parent_run = str(read_object(note).get("run", run))
        check_name(parent_run)
    return StageFolder(runs, run, stage, parent_run)


def fresh_stage_folder(runs: Path, run: str, stage: str) -> StageFolder:
    """A folder for a stage begun anew: in ``run`` where that has no such stage yet, else in a new run beside it."""
    check_name(run)
    with _looking_into(runs):
        name = fresh_run(runs, run) if (runs / run / stage).exists() else run
    return StageFolder(runs, name, stage, parent_run=run)


def fresh_run(runs: Path, run: str) -> str:
    """The first of ``run``, ``run-2``, ``run-3`` … that is no folder yet: none of another run's stages is in it."""
    check_name(run)
    names = (run if n == 1 else f"{run}-{n}" for n in itertools.count(1))
    with _looking_into(runs):
        return next(name for name in names if not (runs / name).exists())


def check_name(name: str) -> None:
    """Raise :class:`UserError` for a name that cannot be a run's folder, or that command lines stumble over."""
    if not re.fullmatch(r"\w[\w.+-]*", name) or len(name) > MAX_NAME_LENGTH:
        raise UserError(
            f"run={name!r}: is not a valid run name.",
            f"Use letters, digits and . + - _ (at most {MAX_NAME_LENGTH}, a letter or digit first).",
        )
    if name in RESERVED:
        raise UserError(
            f"run={name}: is not a valid run name: it is one of the program's own folders ({', '.join(RESERVED)}).",
            "Give another: run=NAME. A run that has this name is renamed by renaming its folder.",
        )


def list_runs(runs: Path) -> dict[str, list[StageFolder]]:
    """All runs by name, each with its stages in the order in which a model goes through them.

    Other folders are left out, also those in which a folder merely has the name of a stage.
    """
    found: dict[str, list[StageFolder]] = {}
    with _looking_into(runs):
        folders = sorted(runs.iterdir()) if runs.is_dir() else []
        for folder in folders:
            stages = [stage for stage in stages_in(folder) if _has_one(folder / stage, _RECORDS)]
            if stages and re.fullmatch(r"\w[\w.+-]*", folder.name):
                found[folder.name] = [_stage_folder(runs, folder.name, stage) for stage in stages]
    return found


def stages_in(run_dir: Path) -> list[str]:
    """The stages that have a folder in that of a run, in the order in which a model goes through them."""
    with _looking_into(run_dir):
        names = [path.name for path in run_dir.iterdir() if is_stage(path)] if run_dir.is_dir() else []
    return sorted(names, key=lambda name: (stage_order(run_dir / name), name))


def is_stage(folder: Path) -> bool:
    """Whether it is the folder of a stage: by its name, or by what is in it."""
    if folder.name in STAGES:
        return folder.is_dir()
    return folder.name not in RESULTS and _has_one(folder, _OWN_RECORDS)


def require_outside(to: Path) -> None:
    """Refuse a folder to write to that is that of a stage or a bundle, or lies in one."""
    for folder in (to.absolute(), *to.absolute().parents):
        with _looking_into(to):
            is_bundle = (folder / "stage.json").is_file()
            is_taken = is_bundle or (is_stage(folder) and _has_one(folder, _RECORDS))
        if is_taken:
            what = "a bundle" if is_bundle else "the folder of a stage"
            raise UserError(f"to={to}: {folder} is {what}, which nothing else is written into.", "Give another folder.")


def stage_order(folder: Path) -> tuple[int, ...]:
    """Where a stage stands among those of its run: a stage of anybody's own right behind that which it started from."""
    if folder.name in STAGES:
        return (STAGES.index(folder.name),)
    try:
        chain = ["base", *(parent["stage"] for parent in read_object(folder / "bundle" / "stage.json")["parents"])]
    except (UserError, TypeError, KeyError):  # not finished, or damaged: who reads the bundle says so
        return (len(STAGES),)
    last = max(number for number, name in enumerate(chain) if name in STAGES)
    return STAGES.index(chain[last]), len(chain) - last


def _num_lines(path: Path) -> int:
    """-1: there is no such file."""
    return len(whole_lines(path)) if path.exists() else -1


def _record(path: Path) -> bytes | None:
    """What is in a file of a record's size; None: it is larger, or no file."""
    return read_bytes(path) if path.is_file() and path.stat().st_size <= _MAX_RECORD_BYTES else None


def _has_one(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def newest_stage(runs: Path, run: str) -> StageFolder:
    """The latest finished stage of a run that made a model: what ``run=NAME`` means where no stage is named."""
    finished = [
        folder for folder in _stages_of(runs, run) if folder.status == "finished" and folder.stage != "tokenizer"
    ]
    if not finished:
        raise UserError(f"run={run}: has no finished stage with a model.", f"Train one: nanochat-pl train run={run} …")
    return finished[-1]


def finished_stage(runs: Path, run: str, stage: str) -> StageFolder:
    """A stage of a run that must be finished and have a model.

    Raises:
        UserError: it is not, and the message says what there is instead.
    """
    known = {folder.stage: folder for folder in _stages_of(runs, run)}
    with_model = [name for name in known if name != "tokenizer"]
    fix = f"Name one with stage=…, or leave stage= out: it is the newest then ({', '.join(with_model)})."
    if not with_model:
        fix = f"Train one: nanochat-pl train stage=base run={run} …"
    if stage == "tokenizer":
        raise UserError(f"stage=tokenizer: has no model; valid: {', '.join(with_model) or 'none yet'}.", fix)
    if stage not in known:
        raise UserError(f"stage={stage}: {runs / run} has no such stage; it has {', '.join(known)}.", fix)
    if known[stage].status != "finished":
        raise UserError(
            f"{known[stage].path}: is not finished.", f"Finish it: nanochat-pl train stage={stage} run={run} …"
        )
    return known[stage]


def only_run_with(runs: Path, stage: str) -> str:
    """The name of the only run in which a stage is finished; where there are several, an error that lists them."""
    names = [
        name
        for name, stages in list_runs(runs).items()
        if any(folder.stage == stage and folder.status == "finished" for folder in stages)
    ]
    if len(names) == 1:
        return names[0]
    if names:
        raise UserError(f"run: several runs have a finished stage {stage}: {', '.join(names)}.", "Say which: run=NAME.")
    raise UserError(
        f"{runs}: no run has a finished stage {stage}.",
        f"Train one first: nanochat-pl train stage={stage}, or point paths.runs=… to where it is.",
    )


def _stages_of(runs: Path, run: str) -> list[StageFolder]:
    check_name(run)
    known = list_runs(runs)
    if run not in known:
        hint = did_you_mean(run, known) if known else "there are no runs yet"
        raise UserError(f"run={run}: there is no such run in {runs}; {hint}", "nanochat-pl runs lists what is there.")
    return known[run]


@contextlib.contextmanager
def _looking_into(runs: Path) -> Iterator[None]:
    """Turn what stands in the way of a mere look (no right to it, a name that is too long) into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or runs}: cannot be looked at: {error.strerror or error}",
            "Set paths.runs=… to a folder that you may use.",
        ) from error


def _holder(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() or "another process"
