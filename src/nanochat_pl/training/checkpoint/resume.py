"""Resume files: all that a stopped run needs to go on, bit for bit.

They are Lightning checkpoints (weights, optimizer, loops, callbacks), written atomically into the run's folder while
the next steps are made, loadable with ``weights_only=True``, and named by the step. The same command goes on from the
newest readable one.
Nothing in a training draws random numbers from a global generator, so none has to be kept: first weights, row orders
and tasks have generators of their own, which are functions of a seed and a number.
"""

from __future__ import annotations

import math
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError, first_line
from nanochat_pl.common.files import entries, explain_disk_errors, read_object, write_json
from nanochat_pl.common.run_dir import SHARED_RUNS
from nanochat_pl.common.text_files import kind_of_file
from nanochat_pl.distributed import collectives, coordination
from nanochat_pl.training.callbacks.metrics import StepClock
from nanochat_pl.training.checkpoint.io import IN_BACKGROUND, BackgroundCheckpointIO, unreadable_explained, wrong_bytes

_NAME = re.compile(r"step=(\d{6,})\.ckpt")
_DAMAGED = re.compile(rf"{_NAME.pattern}\.damaged")
BEST = "best.json"
# What the main process knows at the beginning of a step and all must hear.
NUM_NOTICES = 3
NOTHING, SAVE_IS_DUE, SAVE_FAILED = range(NUM_NOTICES)


def damage(path: Path) -> str | None:
    """What is wrong with a resume file: None where nothing is (every byte is verified).

    Raises:
        UserError: it cannot be read. That is no damage: a disk in the network may be back in a minute.
    """
    with unreadable_explained(path):
        path.stat()
        if kind := kind_of_file(path):  # to open a FIFO might wait for ever
            return f"is {kind}"
        return wrong_bytes(path) or _wrong_content(path)


def _wrong_content(path: Path) -> str | None:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # as above, and of torch's own reader
        if str(error).startswith("unable to "):  # open, stat or map the file: how torch says what the system refused
            raise OSError(first_line(error)) from error
        return f"is a file of another kind: {first_line(error)}"
    if not isinstance(content, dict) or not {"global_step", "state_dict", "optimizer_states"} <= content.keys():
        return "is a file of another kind"
    step = step_of(path)
    return None if content["global_step"] == step else f"is of step {content['global_step']}"


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
    name = coordination.run_on_rank_zero(lambda: _newest_readable(folder))
    if name is None:
        return None
    path: Path = folder / name

    def look() -> None:
        if not path.is_file():
            raise UserError(
                f"{path}: the main process sees it, {socket.gethostname()} does not.",
                fix=SHARED_RUNS,
            )

    coordination.raise_on_all_ranks(look)
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
        with explain_disk_errors(path):
            path.replace(path.with_name(f"{path.name}.damaged"))
        rank_zero_print(f"{path} is damaged ({problem}): going on from an older one.")


class ResumeFiles(Callback):
    """Writes a resume file every so often, at the last step, and when the run is stopped; keeps the newest few.

    The main process writes it in the background. What comes after that (older files go, the best are ranked) is done
    once the new file is verified, between two steps. One that is due by time before the one before is done waits for
    it while the training goes on; any other waits at once, and the training with it.

    Args:
        folder: where the files are.
        every_steps: steps between two; None: ``every_minutes`` decides.
        keep_last: how many of the newest are kept.
        clock: what counts as the training's time.
        keep_best: how many are kept besides: of the measured steps those with the lowest val/bpb, which stand in
            ``best.json``. Each measured step then has a file.
        measured_every: steps between two validations.
        every_minutes: by the clock of the main process, from the beginning of one file to that of the next.

    Attributes:
        io: writes and reads them.
    """

    def __init__(
        self,
        folder: Path,
        every_steps: int | None,
        keep_last: int,
        clock: StepClock,
        keep_best: int = 0,
        measured_every: int = 0,
        every_minutes: float = 10.0,
    ) -> None:
        self.folder, self.every_steps, self.keep_last, self.clock = folder, every_steps, keep_last, clock
        assert measured_every or not keep_best, "nothing is measured"
        self.keep_best, self.measured_every, self.every_minutes = keep_best, measured_every, every_minutes
        self.io = BackgroundCheckpointIO()
        self._best: dict[str, float] = {}  # names of files, best first
        self._measured: dict[str, float] = {}  # not ranked yet
        self._is_settled = True
        self._is_due = False
        self._last_begun = time.monotonic()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out which files are the best so far, and let go of those that a kill has kept."""
        if collectives.world_size() > 1:
            is_sharded = getattr(pl_module, "is_sharded", False)
            self.io.gathered = ("optimizer_states", "state_dict") if is_sharded else ("optimizer_states",)
        self._best = coordination.run_on_rank_zero(self._ranking)
        coordination.run_on_rank_zero(self._let_go)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The time to the first file begins."""
        self._last_begun = time.monotonic()

    def notice(self) -> int:
        """What all processes must hear at the beginning of a step; of the main one alone it is something.

        It goes with another number that they compare there (:class:`GracefulStop`), and comes back in :meth:`heed`.
        """
        if not collectives.is_rank_zero():
            return NOTHING
        if not self.io.is_writing:
            self._settle()
        if self.io.failure is not None:
            return SAVE_FAILED
        waited = time.monotonic() - self._last_begun
        is_due = self.every_steps is None and waited >= 60 * self.every_minutes and not self.io.is_writing
        return SAVE_IS_DUE if is_due else NOTHING

    def heed(self, notice: int) -> None:
        """Take what :meth:`notice` said on the main process. All processes call it.

        Raises:
            UserError: on all processes: a file could not be written. The older ones are untouched.
        """
        if notice == SAVE_FAILED:
            coordination.run_on_rank_zero(self._finish)
        self._is_due = notice == SAVE_IS_DUE

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step, before what is measured after it: that may fail or take long."""
        step = trainer.global_step
        measured = self.keep_best and step % self.measured_every == 0
        by_steps = self.every_steps is not None and step % self.every_steps == 0
        is_last = step == trainer.max_steps
        if self._is_due or by_steps or measured or is_last:
            with self.clock.paused():
                self.save(trainer, wait=is_last)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the file that is being written, also where a callback has ended the training."""
        coordination.run_on_rank_zero(self._finish)

    def save(self, trainer: Trainer, wait: bool = False, after_failure: bool = False) -> None:
        """Begin the file of the last finished step, once the one before is done. All processes call it.

        Args:
            trainer: what is saved.
            wait: until this one is done, too.
            after_failure: try it also where the file before could not be written: it is the last chance.

        Raises:
            UserError: on all processes: the main one could not write a file. The older ones are untouched.
        """
        path = self.folder / f"step={trainer.global_step:06d}.ckpt"

        def is_there() -> bool:
            if after_failure:
                self.io.wait()
                self.io.failure = None
            self._finish()
            if not path.exists():
                _save_metrics(trainer)  # first: a run that goes on from the file has them
                return False
            return True

        if coordination.run_on_rank_zero(is_there):
            return
        self._is_settled, self._last_begun = False, time.monotonic()
        # False: all of it, not the weights alone.
        trainer.save_checkpoint(path, weights_only=False, storage_options=IN_BACKGROUND)
        if wait:
            coordination.run_on_rank_zero(self._finish)

    def files(self) -> list[Path]:
        """All that there are, newest step first, when the one that is being written is done."""
        self.io.wait()
        return resume_files(self.folder)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank the file of the step that was just measured, as soon as it is whole."""
        name, bpb = f"step={trainer.global_step:06d}.ckpt", trainer.callback_metrics.get("val/bpb")
        if self.keep_best and bpb is not None and math.isfinite(bpb) and collectives.is_rank_zero():
            self._measured[name], self._is_settled = float(bpb), False
            if not self.io.is_writing:
                self._settle()

    def _finish(self) -> None:
        """Wait for the file that is being written. Of the main process alone.

        Raises:
            UserError: it could not be written, or what comes after it could not be done.
        """
        self.io.wait()
        self._settle()
        self.io.raise_failure()

    def _settle(self) -> None:
        """What comes after a file. A failure is that of the file, to be heard by all."""
        if self._is_settled or self.io.failure is not None:
            return
        self._is_settled = True
        try:
            self._rank()
            self._let_go()
        except UserError as error:
            self.io.failure = error

    def _ranking(self) -> dict[str, float]:
        path = self.folder / BEST
        if not self.keep_best:
            path.unlink(missing_ok=True)
        best = read_object(path, "Delete it: the best are found anew.") if path.exists() else {}
        return {name: bpb for name, bpb in best.items() if (self.folder / name).exists()}

    def _rank(self) -> None:
        measured, self._measured = self._measured, {}
        if measured:
            ranked = sorted((self._best | measured).items(), key=lambda item: item[1])
            self._best = dict(ranked[: self.keep_best])
            write_json(self.folder / BEST, self._best)

    def _let_go(self) -> None:
        files = resume_files(self.folder)
        for old in files[self.keep_last :]:
            if old.name not in self._best:
                with explain_disk_errors(old):
                    old.unlink(missing_ok=True)
        for damaged, step in damaged_files(self.folder).items():
            newer = [path for path in files if step_of(path) >= step]  # its own step, written anew, is one of them
            if len(newer) >= self.keep_last and damaged.is_file():
                with explain_disk_errors(damaged):
                    damaged.unlink(missing_ok=True)


def _save_metrics(trainer: Trainer) -> None:
    for logger in trainer.loggers:
        logger.save()
