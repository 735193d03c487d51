"""Resume files: all that a stopped run needs to go on, bit for bit.

They are Lightning checkpoints (weights, optimizer, loops, callbacks), written atomically into the run's folder,
loadable with ``weights_only=True``, and named by the step. The same command goes on from the newest readable one.
Nothing in a training draws random numbers from a global generator, so none has to be kept: first weights, row orders
and tasks have generators of their own, which are functions of a seed and a number.
"""

from __future__ import annotations

import contextlib
import errno
import math
import re
import socket
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from torch.utils._pytree import tree_leaves

from nanochat_pl.common import together
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import (
    FREE_SPACE,
    disk_errors_explained,
    entries,
    free_bytes,
    read_json,
    write_atomically,
    write_json,
)
from nanochat_pl.common.run_folder import SHARED_RUNS
from nanochat_pl.training.metrics import StepClock

_NAME = re.compile(r"step=(\d{6,})\.ckpt")
_DAMAGED = re.compile(rf"{_NAME.pattern}\.damaged")
BEST = "best.json"


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints that are whole or not there: written beside their place, synced, read back, renamed.

    Reading back finds what went wrong on the way to the operating system: it gives the bytes that it keeps in memory.
    What a disk loses is found at the next start, which verifies each file that it might use.

    Attributes:
        failure: why the last one was not written. It is raised by :meth:`ResumeFiles.save`, on all processes: where
            Lightning calls this one, the others are waiting for the main process.
    """

    failure: UserError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``. Where that cannot be, older files are untouched and ``failure`` is set."""
        path = Path(path)
        self.failure = None
        try:
            _require_space(checkpoint, path)
            write_atomically(
                path, lambda temporary: _write(checkpoint, temporary, path), lambda temporary: _verify(temporary, path)
            )
        except UserError as error:
            self.failure = error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; its tensors stay on the disk until they are copied into place."""
        with _unreadable_explained(path):
            return torch.load(path, map_location=map_location or "cpu", weights_only=True, mmap=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


def _require_space(checkpoint: dict[str, Any], path: Path) -> None:
    needed = sum(leaf.nbytes for leaf in tree_leaves(checkpoint) if isinstance(leaf, torch.Tensor))
    if needed > (free := free_bytes(path)):
        raise UserError(
            f"{path}: takes {needed / 2**20:,.1f} MiB, and the disk has {free / 2**20:,.1f} MiB free;"
            " the older files are whole.",
            fix=f"{FREE_SPACE} Then the same command goes on.",
        )


def _write(checkpoint: dict[str, Any], temporary: Path, path: Path) -> None:
    try:
        torch.save(checkpoint, temporary)
    except RuntimeError as error:  # what torch's zip writer raises where the disk is full
        raise UserError(
            f"{path}: could not be written ({free_bytes(path) / 2**20:,.1f} MiB free on the disk):"
            f" {str(error).splitlines()[0]}",
            fix=f"{FREE_SPACE} Then the same command goes on.",
        ) from error


def _verify(temporary: Path, path: Path) -> None:
    if (problem := _wrong_bytes(temporary)) is not None:
        raise UserError(f"{path}: what was written cannot be read back: {problem}.", fix="Check the disk.")


@contextlib.contextmanager
def _unreadable_explained(path: Path) -> Iterator[None]:
    """Tell a file that cannot be read from one that is damaged: nothing is known of its bytes."""
    try:
        yield
    except (OSError, MemoryError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error) or "out of memory"
        raise UserError(
            f"{path}: cannot be read: {why}.",
            fix="Nothing was changed. Where the disk, the network or its permissions are to blame, put that right, and"
            " the same command goes on. Without this file it goes on from an older one.",
        ) from error


def damage(path: Path) -> str | None:
    """What is wrong with a resume file: None where nothing is (every byte is verified).

    Raises:
        UserError: it cannot be read. That is no damage: a disk in the network may be back in a minute.
    """
    with _unreadable_explained(path):
        return "is a folder" if path.is_dir() else _wrong_bytes(path) or _wrong_content(path)


def _wrong_bytes(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint: None where each one's checksum is right."""
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                broken = archive.testzip()
        except Exception as error:  # wrong bytes become whatever zipfile, zlib and all that they call make of them
            # EINVAL: the archive's own table points to before the file's begin.
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            return _first_line(error)
    return f"{broken} is damaged" if broken else None


def _wrong_content(path: Path) -> str | None:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # as above, and of torch's own reader
        if str(error).startswith("unable to "):  # open, stat or map the file: how torch says what the system refused
            raise OSError(_first_line(error)) from error
        return f"is a file of another kind: {_first_line(error)}"
    if not isinstance(content, dict) or not {"global_step", "state_dict", "optimizer_states"} <= content.keys():
        return "is a file of another kind"
    step = step_of(path)
    return None if content["global_step"] == step else f"is of step {content['global_step']}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def step_of(path: Path) -> int:
    """The step that a resume file is of."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def resume_files(folder: Path) -> list[Path]:
    """The resume files of a folder, newest step first."""
    files = [path for path in entries(folder) if _NAME.fullmatch(path.name)]
    return sorted(files, key=step_of, reverse=True)


def damaged_files(folder: Path) -> dict[Path, int]:
    """The files that were found damaged at a start, each with the step that it was of."""
    found = ((path, _DAMAGED.fullmatch(path.name)) for path in entries(folder))
    return {path: int(match[1]) for path, match in found if match}


def newest_resume_file(folder: Path) -> Path | None:
    """The newest file that can be read; damaged ones are named in a warning and passed over.

    All processes call it; the main one looks and tells the others.

    Raises:
        UserError: a file cannot be read; there are some, and all are damaged; or a process cannot see what the main
            process sees.
    """
    name = together.by_main(lambda: _newest_readable(folder))
    if name is None:
        return None
    path: Path = folder / name

    def look() -> None:
        if not path.is_file():
            raise UserError(
                f"{path}: the main process sees it, {socket.gethostname()} does not.",
                fix=SHARED_RUNS,
            )

    together.agreed(look)
    return path


def _newest_readable(folder: Path) -> str | None:
    damaged: dict[Path, str] = {}
    for path in resume_files(folder):
        problem = damage(path)
        if problem is None:
            _put_aside(damaged)
            return path.name
        damaged[path] = problem
    damaged |= dict.fromkeys(damaged_files(folder), "was so before")
    if damaged:
        raise UserError(
            [f"{path} is damaged ({problem})." for path, problem in damaged.items()],
            fix="No resume file is left to go on from, so nothing was done. Bring one back from a copy; or begin again,"
            f" with resume=never or after deleting {folder.parent}.",
        )
    return None


def _put_aside(damaged: Mapping[Path, str]) -> None:
    """Out of the way: the run will come to these steps again and write them anew."""
    for path, problem in damaged.items():
        with disk_errors_explained(path):
            path.replace(path.with_name(f"{path.name}.damaged"))
        warnings.warn(f"{path} is damaged ({problem}): going on from an older one.", stacklevel=2)


class ResumeFiles(Callback):
    """Writes a resume file every N steps, at the last step, and when the run is stopped; keeps the newest few.

    Args:
        folder: where the files are.
        every_steps: N.
        keep_last: how many of the newest are kept.
        clock: what counts as the training's time.
        keep_best: how many are kept besides: of the measured steps those with the lowest val/bpb, which stand in
            ``best.json``. Each measured step then has a file.
        measured_every: steps between two validations.
    """

    def __init__(
        self,
        folder: Path,
        every_steps: int,
        keep_last: int,
        clock: StepClock,
        keep_best: int = 0,
        measured_every: int = 0,
    ) -> None:
        self.folder, self.every_steps, self.keep_last, self.clock = folder, every_steps, keep_last, clock
        assert measured_every or not keep_best, "nothing is measured"
        self.keep_best, self.measured_every = keep_best, measured_every
        self._best: dict[str, float] = {}  # names of files, best first

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out which files are the best so far, and let go of those that a kill has kept."""
        self._best = together.by_main(self._ranking)
        together.by_main(self._let_go)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step, before what is measured after it: that may fail or take long."""
        step = trainer.global_step
        measured = self.keep_best and step % self.measured_every == 0
        if step % self.every_steps == 0 or step == trainer.max_steps or measured:
            with self.clock.paused():
                self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write the file of the last finished step, then let the oldest go. All processes call it.

        Raises:
            UserError: on all processes: the main one could not write the file. The older ones are untouched.
        """
        path = self.folder / f"step={trainer.global_step:06d}.ckpt"
        if together.by_main(path.exists):
            return
        together.by_main(lambda: _save_figures(trainer))  # first: a run that goes on from the file has them
        trainer.save_checkpoint(path, weights_only=False)  # False: all of it, not the weights alone
        io = trainer.strategy.checkpoint_io
        assert isinstance(io, AtomicCheckpointIO)
        together.by_main(lambda: self._settle(io.failure))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank the file of the step that was just measured."""
        name, bpb = f"step={trainer.global_step:06d}.ckpt", trainer.callback_metrics.get("val/bpb")
        if self.keep_best and bpb is not None and math.isfinite(bpb):
            together.by_main(lambda: self._rank(name, float(bpb)))

    def _ranking(self) -> dict[str, float]:
        path = self.folder / BEST
        if not self.keep_best:
            path.unlink(missing_ok=True)
        best = read_json(path) if path.exists() else {}
        return {name: bpb for name, bpb in best.items() if (self.folder / name).exists()}

    def _rank(self, name: str, bpb: float) -> None:
        ranked = sorted((self._best | {name: bpb}).items(), key=lambda item: item[1])
        self._best = dict(ranked[: self.keep_best])
        write_json(self.folder / BEST, self._best)
        self._let_go()

    def _settle(self, failure: UserError | None) -> None:
        if failure is not None:
            raise failure
        self._let_go()

    def _let_go(self) -> None:
        files = resume_files(self.folder)
        for old in files[self.keep_last :]:
            if old.name not in self._best:
                old.unlink(missing_ok=True)
        for damaged, step in damaged_files(self.folder).items():
            newer = [path for path in files if step_of(path) >= step]  # its own step, written anew, is one of them
            if len(newer) >= self.keep_last and damaged.is_file():
                damaged.unlink(missing_ok=True)


def _save_figures(trainer: Trainer) -> None:
    for logger in trainer.loggers:
        logger.save()
