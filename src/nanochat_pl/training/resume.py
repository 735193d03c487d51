"""Resume files: all that a stopped run needs to go on, bit for bit.

They are Lightning checkpoints (weights, optimizer, loops, callbacks), written atomically into the run's folder,
loadable with ``weights_only=True``, and named by the step. The same command goes on from the newest readable one.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import free_bytes, write_atomically
from nanochat_pl.training.metrics import StepClock

_NAME = re.compile(r"step=(\d{6,})\.ckpt")


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints that are whole or not there: written beside their place, synced, read back, renamed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            UserError: the disk is full or the folder cannot be written; older files are untouched.
        """
        path = Path(path)
        write_atomically(path, lambda temporary: _write_verified(checkpoint, temporary, path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; its tensors stay on the disk until they are copied into place."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True, mmap=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


def _write_verified(checkpoint: dict[str, Any], temporary: Path, path: Path) -> None:
    try:
        torch.save(checkpoint, temporary)
    except RuntimeError as error:  # what torch's zip writer raises where the disk is full
        raise UserError(
            f"{path}: could not be written ({free_bytes(path) / 2**20:,.0f} MiB free on the disk): {error}",
            fix="Free some space, or set paths.runs=… to a folder on another disk; the same command goes on.",
        ) from error
    if (problem := damage(temporary)) is not None:
        raise UserError(f"{path}: what was written cannot be read back: {problem}.", fix="Check the disk.")


def damage(path: Path) -> str | None:
    """What is wrong with a resume file: None where nothing is (every byte's checksum is verified)."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        return str(error)
    return f"{broken} is damaged" if broken else None


def resume_files(folder: Path) -> list[Path]:
    """The resume files of a folder, newest step first."""
    numbered = [(int(match[1]), path) for path in folder.glob("step=*.ckpt") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def newest_resume_file(folder: Path) -> Path | None:
    """The newest file that can be read; damaged ones are named in a warning and passed over."""
    for stale in folder.glob("*.tmp.*"):  # of a writer that was killed; the lock says that nobody else writes
        stale.unlink()
    for path in resume_files(folder):
        problem = damage(path)
        if problem is None:
            return path
        # Out of the way: the run will come to this step again and write it anew.
        path.replace(path.with_name(f"{path.name}.damaged"))
        warnings.warn(f"{path} is damaged ({problem}): going on from an older one.", stacklevel=2)
    return None


class ResumeFiles(Callback):
    """Writes a resume file every N steps, at the last step, and when the run is stopped; keeps the newest few."""

    def __init__(self, folder: Path, every_steps: int, keep_last: int, clock: StepClock) -> None:
        self.folder, self.every_steps, self.keep_last, self.clock = folder, every_steps, keep_last, clock

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step."""
        if trainer.global_step % self.every_steps == 0 or trainer.global_step == trainer.max_steps:
            with self.clock.paused():
                self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write the file of the last finished step, then let the oldest go."""
        path = self.folder / f"step={trainer.global_step:06d}.ckpt"
        if path.exists():
            return
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(path, weights_only=False)  # False: all of it, not the weights alone
        for old in resume_files(self.folder)[self.keep_last :]:
            old.unlink()
