"""What one process trains on in one optimizer step, and how it is cut into micro-batches.

R rows of this process in one optimizer step, T positions, M rows in memory at once (`device_batch_size`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat_pl.common.constants import IGNORE_INDEX


class StepBatch(NamedTuple):
    """This process's rows of one optimizer step: one Lightning batch."""

    inputs: Tensor  # int32 or int64 (R, T)
    targets: Tensor  # of the same type (R, T), IGNORE_INDEX where nothing is to be learnt
    num_targets: int  # of these rows, counted on the host
    sources: Tensor | None = None  # int64 (R,): of a mixture, the number of each row's source
    num_rows: int = 0  # of the largest share that a process has of this step; 0: of this one
    num_rows_of_all: int = 0  # of all shares; 0: of this one
    first_row: int = 0  # the number of the first of these rows; the others follow
    row_numbers: tuple[int, ...] | None = None  # of each of these rows, where they do not follow each other
    weights: Tensor | None = None  # float32 (R, T): factors on the nats of the targets; None: ones
    divisor: float | None = None  # of the sum over the targets of all processes; None: how many they are


class ValidationBatch(NamedTuple):
    """Rows to validate on: one Lightning batch of validation."""

    inputs: Tensor  # int32 or int64 (M, T)
    targets: Tensor  # of the same type (M, T), IGNORE_INDEX where nothing is measured
    num_bytes: Tensor  # int (M, T): UTF-8 bytes of each target, 0 for special tokens and ignored ones


def micro_batches(batch: StepBatch, device_batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Cut a step into micro-batches of one shape, as many as the largest share of a process has.

    The last one is filled up with rows whose targets are all ignored; where there are no rows left, all are such.

    Yields:
        inputs and targets, int64 (M, T); weights, float32 (M, T), where the step has them.
    """
    for start in range(0, batch.num_rows or len(batch.inputs), device_batch_size):
        end = start + device_batch_size
        inputs, targets = batch.inputs[start:end], batch.targets[start:end]
        weights = None if batch.weights is None else batch.weights[start:end]
        if missing := device_batch_size - len(inputs):
            inputs = torch.cat([inputs, inputs.new_zeros(missing, inputs.shape[1])])
            targets = torch.cat([targets, targets.new_full((missing, targets.shape[1]), IGNORE_INDEX)])
            if weights is not None:
                weights = torch.cat([weights, weights.new_zeros(missing, weights.shape[1])])
        yield inputs.long(), targets.long(), weights


def num_micro_batches(num_rows: int, device_batch_size: int) -> int:
    return -(-num_rows // device_batch_size)
