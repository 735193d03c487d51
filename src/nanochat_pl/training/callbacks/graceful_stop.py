"""Stops: a signal is noticed between two micro-batches, drops the unfinished step, and leaves an exact resume file.

With several processes one that has heard of it is enough: they agree between the same two micro-batches.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from lightning.pytorch import Callback, Trainer

from nanochat_pl.common.constants import SAME_SIGNAL_SECONDS, SHOW_CURSOR, STOP_SIGNALS
from nanochat_pl.common.errors import LostContact, SharedError, UserError
from nanochat_pl.common.signals import heeded_signals
from nanochat_pl.distributed import collectives
from nanochat_pl.training.checkpoint.resume import NUM_NOTICES, ResumeFiles, resume_files, step_of

SIGALRM = 14  # what the end of trainer.max_time counts as, also on systems without that signal
# How it stands with the rows that a process waits for; above, a stop is asked for.
_READY, _NOT_YET, _NEVER = range(3)


class StopRequested(Exception):
    """A signal asked the training to end, or its time was over. All processes raise it at the same place.

    Attributes:
        signum: the signal; the process exits with 128 + signum.
        step: optimizer steps that were made.
    """

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"signal {signum} after step {step}")
        self.signum, self.step = signum, step


class NoMoreRows(SharedError):
    """The data cannot give the rows of the next step. The steps before are whole."""


def leave_signals_to_parent(worker: int = 0) -> None:
    """For processes that read rows ahead: launchers signal whole groups, and a training that stops still needs them.
    They end with it."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


class GracefulStop(Callback):
    """Turns signals into a flag that the training step looks at. A second signal ends the process at once.

    They are heeded in its context, which may be entered again (not within itself).

    Args:
        resume_files: writes the file of the last finished step.
        max_seconds: of the training, after which it stops as on a signal.

    Attributes:
        signum: the signal that came, None before.
        when: it will stop, as the person is told.
    """

    def __init__(self, resume_files: ResumeFiles, max_seconds: float | None = None) -> None:
        self.resume_files, self.max_seconds = resume_files, max_seconds
        self.signum: int | None = None
        self.when = "after this micro-batch"
        self._since = 0.0
        self._deadline: float | None = None
        self._trainer: Trainer | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        # With nohup, the training outlives its terminal.
        self._previous = {signum: signal.signal(signum, self._handle) for signum in heeded_signals()}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, StopRequested) and collectives.world_size() > 1:
            self._end_together()
        if isinstance(error, LostContact):
            error.signum = self.signum
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self._note(signum)
        elif signum != self.signum or time.monotonic() - self._since > SAME_SIGNAL_SECONDS:
            _write(SHOW_CURSOR if os.isatty(2) else b"")
            os._exit(128 + signum)

    def _note(self, signum: int, why: str = "") -> None:
        self.signum, self._since = signum, time.monotonic()
        if collectives.is_rank_zero():
            # Not through Python's buffers: the signal may have come in the middle of writing to them.
            _write(f"\n{why}Stopping {self.when}; once more stops at once.\n".encode())

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """The time that the training may take begins."""
        self._trainer = trainer
        if self.max_seconds is not None:
            self._deadline = time.monotonic() + self.max_seconds

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """From here on the step asks."""
        pl_module.micro_batch_hooks.append(self._between_micro_batches)

    def _between_micro_batches(self, part: int) -> None:
        if part > 0:
            self.check()
            return
        # What the main process knows of the resume files goes in the same number, below any signal: for itself it would
        # be one more collective in each step.
        raise_on_all_ranks = collectives.all_reduce_max(NUM_NOTICES * self._asked() or self.resume_files.notice())
        if raise_on_all_ranks >= NUM_NOTICES:
            self._stop(raise_on_all_ranks // NUM_NOTICES)
        self.resume_files.heed(raise_on_all_ranks)

    def check(self) -> None:
        """Raise :class:`StopRequested` where a signal came, or the time is over, in any of the processes.

        All processes call it equally often.
        """
        if signum := collectives.all_reduce_max(self._asked()):
            self._stop(signum)

    def check_signal(self) -> None:
        """As :meth:`check`, however late it is: what is left is done in a moment."""
        if signum := collectives.all_reduce_max(self.signum or 0):
            self._stop(signum)

    def wait_for(self, wait: Callable[[Callable[[], None]], None]) -> None:
        """Wait for rows; all processes come back together.

        Args:
            wait: waits for them, and calls its argument again and again.

        Raises:
            StopRequested: a stop was asked for.
            NoMoreRows: in one of the processes ``wait`` raised a :class:`UserError`: its problems.
        """
        state, problem = _READY, None

        def not_yet() -> None:
            self._compare(_NOT_YET)

        try:
            wait(not_yet)
        except NoMoreRows:
            raise  # of a comparison
        except UserError as error:
            state, problem = _NEVER, error
        while self._compare(state, problem) == _NOT_YET:
            pass  # a comparison waits for the others, who look again and again

    def _compare(self, state: int, problem: UserError | None = None) -> int:
        """Tell the others how it stands here; what counts most of all processes."""
        asked = self._asked()
        raise_on_all_ranks = collectives.all_reduce_max(_NEVER + asked if asked else state)
        if raise_on_all_ranks > _NEVER:
            self._stop(raise_on_all_ranks - _NEVER)
        if raise_on_all_ranks == _NEVER:
            told = json.dumps([problem.problems, problem.fix]) if problem else ""
            problems, fix = json.loads(next(text for text in collectives.all_gather_str(told) if text))
            raise NoMoreRows(problems, fix)
        return raise_on_all_ranks

    def check_after_error(self) -> None:
        """Raise :class:`StopRequested` for an error that came after a signal: with the step of the newest resume file,
        as nobody knows how far the unfinished one had got. Without a signal nothing is done."""
        if self.signum is None:
            return
        try:
            self.check()
        except StopRequested as stop:
            step = max(map(step_of, resume_files(self.resume_files.folder)), default=0)
            raise StopRequested(stop.signum, step) from None

    def check_alone(self) -> None:
        """As :meth:`check`, where processes need not call it equally often: of several it does nothing."""
        if collectives.world_size() == 1:
            self.check()

    def _asked(self) -> int:
        """The signal that came, here; 0 where none did."""
        if self.signum is None and self._deadline is not None and time.monotonic() > self._deadline:
            self._note(SIGALRM, "trainer.max_time is over. ")
        return self.signum or 0

    def _stop(self, signum: int) -> None:
        if self.signum is None:
            self._note(signum)
        assert self._trainer is not None
        raise StopRequested(signum, self._trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Write the resume file of the last finished step: until the optimizer steps, nothing has changed."""
        if isinstance(exception, StopRequested | NoMoreRows) and trainer.global_step > 0:
            self.resume_files.save(trainer, wait=True, after_failure=True)

    def _end_together(self) -> None:
        """From here on nothing but the end is left, and no process goes before all know it: a launcher that sees the
        first one end sends signals to the others."""
        for signum in self._previous:
            signal.signal(signum, signal.SIG_IGN)
        self._previous = {}
        collectives.barrier()


def _write(text: bytes) -> None:
    """Print from the handler of a signal; where the terminal is gone, which is why the signal came, to nobody."""
    with contextlib.suppress(OSError):
        os.write(2, text)
