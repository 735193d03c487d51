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
from nanochat_pl.distributed import collectives
from nanochat_pl.optim.schedules import schedule_values
from nanochat_pl.training.out_of_memory import halve_device_batch_size, out_of_memory_hint, runs_out_of_memory

if TYPE_CHECKING:
    from nanochat_pl.training.module import LMModule


class StepBatch(NamedTuple):
    """This process's rows of one optimizer step: one Lightning batch."""

    inputs: Tensor  # int32 or int64 (R, T)
    targets: Tensor  # of the same type (R, T), IGNORE_INDEX where nothing is to be learnt
    num_targets: int  # of these rows, counted on the host
    sources: Tensor | None = None  # int64 (R,): of a mixture, the number of each row's source
    num_rows: int = 0  # of the largest share that a process has of this step; 0: of this one
    num_rows_of_all: int = 0  # of all shares; 0: of this one
    first_row: int = 0  # the number of the first of these rows; the others follow


class StepResult(NamedTuple):
    """What a step measured, over all processes and the same on each."""

    loss: float  # nats per target
    gradient_norm: float  # L2, before clipping
    num_targets: int
    skipped: bool  # whether a figure was not finite, and nothing was updated


def training_step(stage: LMModule, batch: StepBatch) -> StepResult:
    """One optimizer step: loss and gradients over all micro-batches and processes, then the schedule, then the update.

    The loss is the summed nats of all targets of the step divided by their number, so the size of the micro-batches
    and the number of processes have no say in it. Nothing is changed before ``optimizer.step``: a stop between
    micro-batches drops the step, and a step for which memory did not suffice is done again from its beginning.

    Raises:
        UserError: the step has no targets; its loss or gradient is not finite, and that is not to be skipped (raised
            before the update); a single row needs more memory than there is.
    """
    step, optimizer, guard = stage.global_step, stage.optimizer, stage.guard
    num_targets = collectives.all_reduce_sum(batch.num_targets)
    if num_targets == 0:
        raise UserError(f"step {step + 1}: none of its rows has a token to train on.", fix="Look at the stage's data.")
    local_loss, ran_out = torch.zeros((), device=stage.device), False  # of this process
    for part, (inputs, targets) in enumerate(micro_batches(batch, stage.device_batch_size)):
        stage.between_micro_batches(part)
        ran_out = ran_out or runs_out_of_memory(add_gradients, stage, inputs, targets, num_targets, local_loss)
    if collectives.all_reduce_max(ran_out):  # on any process
        halve_device_batch_size(stage, ran_out)
        return training_step(stage, batch)
    with out_of_memory_hint(stage, "where the gradients are summed; nothing was changed"):
        collectives.all_reduce_(local_loss)
        norm = optimizer.reduce_gradients() / guard.loss_scale.factor
    loss, norm = torch.stack([local_loss, norm]).tolist()  # the one wait for the device
    if passed := guard.passes(stage, batch, loss, norm):
        guard.scale_gradients(optimizer, norm)
    else:
        optimizer.skip_step()
    optimizer.set_step_values(schedule_values(stage.schedule, step, stage.num_steps))
    with out_of_memory_hint(stage, "in the optimizer's step; its weights may be changed in part"):
        stage.update()
    optimizer.zero_grad()
    return StepResult(loss, norm, num_targets, skipped=not passed)


def add_gradients(stage: LMModule, inputs: Tensor, targets: Tensor, num_targets: int, loss: Tensor) -> None:
    """Forward and backward of a micro-batch, (M, T); what it has of the step's loss is added to ``loss``, a scalar."""
    nats = stage.weighted_loss(inputs, targets) / num_targets
    stage.manual_backward(stage.guard.loss_scale.of(nats))
    loss += nats.detach()


def micro_batches(batch: StepBatch, device_batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a step into pieces of one shape, int64 (M, T), as many as the largest share of a process has.

    The last one is filled up with rows whose targets are all ignored; where there are no rows left, all are such.
    """
    inputs, targets = batch.inputs, batch.targets
    for start in range(0, batch.num_rows or len(inputs), device_batch_size):
        piece, goals = inputs[start : start + device_batch_size], targets[start : start + device_batch_size]
        if missing := device_batch_size - len(piece):
            piece = torch.cat([piece, piece.new_zeros(missing, piece.shape[1])])
            goals = torch.cat([goals, goals.new_full((missing, goals.shape[1]), IGNORE_INDEX)])
        yield piece.long(), goals.long()


def num_micro_batches(num_rows: int, device_batch_size: int) -> int:
    """Micro-batches that :func:`micro_batches` gives."""
    return -(-num_rows // device_batch_size)
