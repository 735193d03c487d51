"""The training step alone, without Lightning, with all that it asks a stage for."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from nanochat_pl.training.loss_scale import LossScale
from nanochat_pl.training.nonfinite_guard import Guard, OnNonfinite
from tests.helpers.training import Loop, batch_of

MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory")
BATCH = batch_of([16, 3, 9, 16, 1])


class StepLoop(Loop):
    """Small steps with guards.

    Attributes:
        parts: the number of each micro-batch that was begun.
        files: what the stage has for resume files.
        forward, backward: called before each forward and each backward, for faults.
    """

    def __init__(
        self,
        device_batch_size: int = 2,
        dtype: Literal["float32", "float16"] = "float32",
        on_nonfinite: OnNonfinite = "stop",
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(device_batch_size)
        if dtype == "float16":
            self.net.set_compute_dtype(torch.float16)
        self.guard = Guard(on_nonfinite, max_grad_norm, LossScale(dtype == "float16"))
        self.parts: list[int] = []
        self.files: list[Path] = []
        self.max_rows: int | None = None
        self.recipe = SimpleNamespace(model=self.net.config)
        self.forward: Callable[[], None] = lambda: None
        self.backward: Callable[[], None] = lambda: None
        self.weighted_loss = self._loss
        self.manual_backward: Any = self._backward
        self._nats: list[Tensor] = []

    def between_micro_batches(self, part: int) -> None:
        self.parts.append(part)
        if part == 0:
            self._nats = []

    def _loss(self, inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        self.forward()
        nats, of_rows = self.net.loss_by_row(inputs, targets)
        self._nats.append(of_rows)
        return nats

    def _backward(self, loss: Tensor) -> None:
        loss.backward()
        self.backward()

    def row_losses(self, num_rows: int) -> Tensor:
        return torch.cat(self._nats)[:num_rows]

    def inspect_command(self, step: int) -> str:
        return f"doctor step={step}"

    def resume_files(self) -> list[Path]:
        return self.files

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.net.named_parameters()}

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(weight).all()) for weight in self.weights().values())

    def break_gradient(self, value: float = math.inf) -> None:
        """From now on the backward gives one number that is not finite."""

        def spoil() -> None:
            gradient = self.net.lm_head.weight.grad
            assert gradient is not None
            gradient[0, 0] = value

        self.backward = spoil


def fails(error: Exception, *calls: int) -> Callable[..., None]:
    """Something that raises at these calls, counted from 1."""
    count = 0

    def call(*arguments: Tensor) -> None:
        nonlocal count
        count += 1
        if count in calls:
            raise error

    return call
