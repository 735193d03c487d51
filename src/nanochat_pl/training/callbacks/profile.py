"""A trace of a few steps: what runs when, on the host and on the device, for a browser's trace viewer."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.profilers import PyTorchProfiler

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.distributed import collectives
from nanochat_pl.training.callbacks.metrics import StepMetrics


class TraceSteps(Callback):
    """Records a window of steps with torch.profiler, each process its own, into ``trace-steps-FIRST-LAST.json.gz`` in
    the stage's folder.

    The step before the window is recorded, too, and thrown away: the profiler's own beginning takes long. A training
    that goes on within the window records the rest of it.

    Args:
        first_step: the first step that is recorded, counted from 1.
        steps: how many; a trace has some thousand events a step.
        memory: record also what is allocated.
        stacks: record also which line of Python each operation is from; makes the steps several times slower.

    Raises:
        UserError: a number is out of bounds, or Lightning's profiler of the same kind is on, too.
    """

    def __init__(self, first_step: int = 10, steps: int = 3, memory: bool = False, stacks: bool = False) -> None:
        if problems := [
            f"{key}={value}: must be at least 1."
            for key, value in (("first_step", first_step), ("steps", steps))
            if value < 1
        ]:
            raise UserError(problems)
        self.first_step, self.last_step = first_step, first_step + steps - 1
        self.memory, self.stacks = memory, stacks
        self._profiler: torch.profiler.profile | None = None
        self._is_over = False
        self._path = Path()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Before anything is trained."""
        if isinstance(trainer.profiler, PyTorchProfiler):  # type: ignore[attr-defined]
            raise UserError("trainer.profiler=pytorch: records the same steps.", "Leave one of both out.")
        of_rank = f"-rank{collectives.rank()}" if collectives.world_size() > 1 else ""
        name = f"trace-steps-{self.first_step}-{self.last_step}{of_rank}.json.gz"
        self._path = Path(trainer.default_root_dir) / name

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin to record, with one step to warm up where there is one."""
        step = trainer.global_step + 1
        if self._profiler is not None or not self.first_step - 1 <= step <= self.last_step:
            return
        begins = max(step, self.first_step)
        self._profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(
                wait=0, warmup=begins - step, active=self.last_step - begins + 1, repeat=1
            ),
            on_trace_ready=self._write,
            record_shapes=True,
            profile_memory=self.memory,
            with_stack=self.stacks,
        )
        self._profiler.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a step; after the last one the trace is written."""
        if self._profiler is None or self._is_over:
            return
        clock = next((each.clock for each in trainer.callbacks if isinstance(each, StepMetrics)), None)  # type: ignore[attr-defined]
        with contextlib.nullcontext() if clock is None else clock.paused():
            self._profiler.step()
            if trainer.global_step == self.last_step:
                self._end()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """What was recorded until then is written."""
        self._end()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The last step of the training may be before that of the window."""
        if trainer.global_step < self.first_step:
            rank_zero_print(
                f"No trace: it begins at step {self.first_step:,}, and the training has {trainer.global_step:,}."
            )
        self._end()

    def _end(self) -> None:
        if self._profiler is not None and not self._is_over:
            self._is_over = True
            self._profiler.stop()

    def _write(self, profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(self._path))
        rank_zero_print(f"Trace: {self._path}; ui.perfetto.dev opens it in a browser.")
