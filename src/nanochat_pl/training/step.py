"""THE training step: the one place in the project where gradients are computed and an optimizer steps.

R rows of this process in one optimizer step, T positions, M rows in memory at once (`device_batch_size`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.common.errors import UserError
from nanochat_pl.optim.schedules import schedule_values

if TYPE_CHECKING:
    from nanochat_pl.training.stages import TrainingStage


class StepBatch(NamedTuple):
    """The rows of one optimizer step: one Lightning batch."""

    inputs: Tensor  # int64 (R, T)
    targets: Tensor  # int64 (R, T), IGNORE_INDEX where nothing is to be learnt
    num_targets: int  # over the whole step, counted on the host
    sources: Tensor | None = None  # int64 (R,): of a mixture, the number of each row's source


def training_step(stage: TrainingStage, batch: StepBatch) -> Tensor:
    """One optimizer step: loss and gradients over all micro-batches, then the schedule, then the update.

    The loss is the summed nats of all targets of the step divided by their number, so the size of the micro-batches
    has no say in it. Nothing is changed before ``optimizer.step``: a stop between micro-batches drops the step.

    Returns:
        The mean loss in nats per target, a scalar on the device.

    Raises:
        UserError: the step has no targets, or its loss is not finite (raised before the update).
    """
    step, optimizer = stage.global_step, stage.optimizer
    if batch.num_targets == 0:
        raise UserError(f"step {step}: none of its rows has a token to train on.", fix="Look at the stage's data.")
    loss = torch.zeros((), device=stage.device)
    for part, (inputs, targets) in enumerate(micro_batches(batch, stage.device_batch_size)):
        stage.between_micro_batches(part)
        nats = stage.weighted_loss(inputs, targets) / batch.num_targets
        stage.manual_backward(nats)
        loss += nats.detach()
    if not torch.isfinite(loss):
        raise UserError(f"step {step}: the loss is {loss.item()}; the weights are still those of the step before.")
    optimizer.set_step_values(schedule_values(stage.schedule, step, stage.num_steps))
    optimizer.step()
    optimizer.zero_grad()
    return loss


def micro_batches(batch: StepBatch, device_batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a step into pieces of one shape: the last is filled up with rows whose targets are all ignored."""
    inputs, targets = batch.inputs, batch.targets
    for start in range(0, len(inputs), device_batch_size):
        piece, goals = inputs[start : start + device_batch_size], targets[start : start + device_batch_size]
        if missing := device_batch_size - len(piece):
            piece = torch.cat([piece, piece.new_zeros(missing, piece.shape[1])])
            goals = torch.cat([goals, goals.new_full((missing, goals.shape[1]), IGNORE_INDEX)])
        yield piece, goals


def num_micro_batches(num_rows: int, device_batch_size: int) -> int:
    """Micro-batches that :func:`micro_batches` gives."""
    return -(-num_rows // device_batch_size)
