"""Garbage collection at chosen moments. Python's own comes at any, and goes through every object of the process."""

from __future__ import annotations

import gc
from types import TracebackType
from typing import Any

from lightning.pytorch import Callback, Trainer

from nanochat_pl.common.malloc import keep_freed_memory
from nanochat_pl.training.callbacks.metrics import StepClock

COLLECT_EVERY_STEPS = 1_000


class GarbageCollection(Callback):
    """Takes the collector over for the length of the training: ``with`` it, and as a callback.

    After the first step, when all that stays is there (compiling makes much of it), the objects at hand are frozen:
    no later collection looks at them. Then garbage is collected every ``COLLECT_EVERY_STEPS`` steps, and only then. On
    a CPU with glibc all freed memory is given back at these moments, and from the first one on kept at all others.
    """

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock
        self._was_enabled = False
        self._frozen = False

    def __enter__(self) -> GarbageCollection:
        self._was_enabled = gc.isenabled()
        gc.disable()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """As it was before, whatever ended the training."""
        if self._frozen:
            gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a step."""
        if self._frozen and trainer.global_step % COLLECT_EVERY_STEPS:
            return
        with self.clock.paused():
            gc.collect()
            if not self._frozen:
                gc.freeze()
                self._frozen = True
            if pl_module.device.type == "cpu":
                keep_freed_memory()
