"""The training step alone, without Lightning, with all that it asks a stage for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nanochat_pl.training.config import OnNonfinite
from nanochat_pl.training.nonfinite_guard import Guard, LossScale
from tests.helpers.training import Loop, batch_of

MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory")
BATCH = batch_of([16, 3, 9, 16, 1])


class StepLoop(Loop):
    """Small steps with guards.

    Attributes:
        parts: the number of each micro-batch that was begun.
        files: what the stage has for resume files.
        before_forward, after_backward: called at each forward and each backward, for faults.
    """

    def __init__(
        self,
        device_batch_size: int = 2,
        dtype: Literal["float32", "float16"] = "float32",
        on_nonfinite: OnNonfinite = "stop",
        max_grad_norm: float | None = None,
        document_start_id: int | None = None,
    ) -> None:
        super().__init__(device_batch_size)
        assert self.net is not None
        self.net.config = dataclasses.replace(self.net.config, document_start_id=document_start_id)
        if dtype == "float16":
            self.net.set_compute_dtype(torch.float16)
        self.guard = Guard(on_nonfinite, max_grad_norm, LossScale(dtype == "float16"))
        self.parts: list[int] = []
        self.files: list[Path] = []
        self.max_rows: int | None = None
        self.before_forward: Callable[[], None] = lambda: None
        self.after_backward: Callable[[], None] = lambda: None
        self.micro_batch_hooks.append(self.parts.append)

    def weighted_loss(self, inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        self.before_forward()
        return super().weighted_loss(inputs, targets, weights)

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()
        self.after_backward()

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

        self.after_backward = spoil


def fails(error: Exception, *calls: int) -> Callable[..., None]:
    """Something that raises at these calls, counted from 1."""
    count = 0

    def call(*arguments: Tensor) -> None:
        nonlocal count
        count += 1
        if count in calls:
            raise error

    return call
