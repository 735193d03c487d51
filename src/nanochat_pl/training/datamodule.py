"""Rows to steps. Step k trains on rows k·R … (k+1)·R − 1, so the state of the data is the step number alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.data.rows import Rows
from nanochat_pl.training.step import StepBatch


class StepRows(Dataset):
    """Map-style data: item k is the whole of optimizer step k."""

    def __init__(self, rows: Rows, rows_per_step: int) -> None:
        self.rows, self.rows_per_step = rows, rows_per_step

    def __getitem__(self, step: int) -> StepBatch:
        # Later epochs of conversations may fit into a row less than the first, by which the epochs were counted: then
        # the last step goes on from the first row.
        first = step * self.rows_per_step
        inputs, targets = self.rows.read(np.arange(first, first + self.rows_per_step) % len(self.rows))
        return StepBatch(torch.as_tensor(inputs), torch.as_tensor(targets), int((targets != IGNORE_INDEX).sum()))


class StepsFrom(Sampler[int]):
    """The step numbers from where the training stands. It has no length on purpose: Lightning then neither counts
    batches of its own to find the end, nor calls the loader not resumable."""

    def __init__(self, first: int, end: int) -> None:
        self.first, self.end = first, end

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.end))


class RowsDataModule(LightningDataModule):
    """Packed rows of documents, or masked rows of conversations: to the training they are the same."""

    def __init__(self, rows: Rows, rows_per_step: int, num_steps: int, num_workers: int = 0) -> None:
        super().__init__()
        self.steps, self.num_steps, self.num_workers = StepRows(rows, rows_per_step), num_steps, num_workers

    def train_dataloader(self) -> Any:
        """One batch a step, from the step that the trainer has reached."""
        assert self.trainer is not None
        return DataLoader(
            self.steps,
            sampler=StepsFrom(self.trainer.global_step, self.num_steps),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )
