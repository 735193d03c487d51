"""Stops: a signal is noticed between two micro-batches, drops the unfinished step, and leaves an exact resume file."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from lightning.pytorch import Callback, Trainer

from nanochat_pl.common.errors import UserError
from nanochat_pl.training.resume import ResumeFiles

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
SHOW_CURSOR = b"\x1b[?25h"


class StopRequested(Exception):
    """A signal asked the training to end.

    Attributes:
        signum: the signal; the process exits with 128 + signum.
        step: optimizer steps that were made.
    """

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"{signal.Signals(signum).name} after step {step}")
        self.signum, self.step = signum, step


class NoMoreRows(UserError):
    """The data cannot give the rows of the next step. The steps before are whole."""


class GracefulStop(Callback):
    """Turns signals into a flag that the training step looks at. A second signal ends the process at once."""

    def __init__(self, resume_files: ResumeFiles) -> None:
        self.resume_files = resume_files
        self.signum: int | None = None
        self._trainer: Trainer | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        # What is ignored stays so: with nohup, the training outlives its terminal.
        heeded = [signum for signum in SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
        self._previous = {signum: signal.signal(signum, self._handle) for signum in heeded}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            os.write(2, SHOW_CURSOR if os.isatty(2) else b"")
            os._exit(128 + signum)
        self.signum = signum
        # Not through Python's buffers: the signal may have come in the middle of writing to them.
        os.write(2, b"\nStopping after this micro-batch; once more stops at once.\n")

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the signals back: Lightning has put handlers of its own, whose exit code would be 0."""
        for signum in self._previous:
            signal.signal(signum, self._handle)
        self._trainer = trainer
        pl_module.micro_batch_hooks.append(self.check)

    def check(self, part: int = 0) -> None:
        """Raise :class:`StopRequested` where a signal came."""
        if self.signum is not None and self._trainer is not None:
            raise StopRequested(self.signum, self._trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Write the resume file of the last finished step: until the optimizer steps, nothing has changed."""
        if (self.is_a_stop(exception) or isinstance(exception, NoMoreRows)) and trainer.global_step > 0:
            self.resume_files.save(trainer)

    def is_a_stop(self, error: BaseException) -> bool:
        """Whether an exception came of a signal: ours, or torch's where the signal ended a loader process first."""
        return isinstance(error, StopRequested) or (
            self.signum is not None and isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
        )
