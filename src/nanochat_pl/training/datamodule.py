"""Rows to steps. Step k trains on rows k·R … (k+1)·R − 1, so the state of the data is the step number alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset, Sampler

from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.common.errors import UserError
from nanochat_pl.data.batch import StepBatch
from nanochat_pl.data.packing.mixture import MixedRows
from nanochat_pl.data.packing.rows import Rows
from nanochat_pl.distributed.partition import share
from nanochat_pl.evaluation.validation import Validation
from nanochat_pl.training.callbacks.graceful_stop import GracefulStop, leave_signals_to_parent
from nanochat_pl.training.rl.prompts import Prompts


class StepRows(Dataset):
    """Map-style data: item k is this process's share of optimizer step k: with one process, the whole of it."""

    def __init__(self, rows: Rows | MixedRows | Prompts, rows_per_step: int, rank: int = 0, world: int = 1) -> None:
        self.rows, self.rows_per_step, self.rank, self.world = rows, rows_per_step, rank, world

    def __getitem__(self, step: int) -> StepBatch:
        # Of conversations each is trained on as often as was asked for, so the last step may have fewer rows.
        first = step * self.rows_per_step
        count = min(self.rows_per_step, len(self.rows) - first)
        own, largest = (share(first, count, rank, self.world) for rank in (self.rank, 0))
        numbers = np.array(own, dtype=np.int64)
        inputs, targets = self.rows.read(numbers)
        # Those of this share: with several processes, the step sums them before its first backward.
        num_targets = int((targets != IGNORE_INDEX).sum())
        sources = torch.as_tensor(self.rows.place(numbers)[0]) if isinstance(self.rows, MixedRows) else None
        # Half the bytes on their way to the device; a loader process hands them over in shared memory, of which a
        # container has 64 MB.
        ids = torch.as_tensor(inputs, dtype=torch.int32), torch.as_tensor(targets, dtype=torch.int32)
        return StepBatch(*ids, num_targets, sources, num_rows=len(largest), num_rows_of_all=count, first_row=own.start)

    def wait_for(self, step: int, check: Callable[[], None]) -> None:
        """Wait until the rows of a step are there; ``check`` is called again and again."""
        self.rows.wait_for(min((step + 1) * self.rows_per_step, len(self.rows)), check)


class StepsFrom(Sampler[int]):
    """The step numbers from where the training stands. It has no length on purpose: Lightning then neither counts
    batches of its own to find the end, nor calls the loader not resumable."""

    def __init__(self, first: Callable[[], int], end: int, wait_for: Callable[[int], None] = lambda step: None) -> None:
        self.first, self.end, self.wait_for = first, end, wait_for

    def __iter__(self) -> Iterator[int]:
        for step in range(self.first(), self.end):  # of each epoch of a Trainer: after the last step there is none
            # Here and not in a loader process: this one hears signals, and its errors arrive as they are.
            self.wait_for(step)
            yield step


class RowsDataModule(LightningDataModule):
    """Packed rows of documents, or masked rows of conversations: to the training they are the same.

    Args:
        rows: of all steps.
        rows_per_step: R.
        num_steps: the steps end there.
        num_workers: processes that read rows ahead of the training; None: one for a GPU, else none. The rows are the
            same for any number.
        validation: for the Trainer's own validation (``val_check_interval``, ``trainer.validate``): a loader for each
            source.

    The processes of the trainer share the rows of each step, whichever strategy it has.
    """

    def __init__(
        self,
        rows: Rows | MixedRows | Prompts,
        rows_per_step: int,
        num_steps: int,
        num_workers: int | None = 0,
        validation: Validation | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.rows_per_step, self.num_steps, self.num_workers = rows, rows_per_step, num_steps, num_workers
        self.validation = validation

    def train_dataloader(self) -> Any:
        """One batch a step, from the step that the trainer has reached: this process's share of its rows.

        Raises:
            UserError: the trainer is to put a sampler of its own in the place of this one's.
        """
        assert self.trainer is not None
        trainer = self.trainer
        self._require_own_sampler()
        self.steps = StepRows(self.rows, self.rows_per_step, trainer.global_rank, trainer.world_size)
        on_gpu = trainer.strategy.root_device.type == "cuda"
        return DataLoader(
            self.steps,
            sampler=StepsFrom(lambda: trainer.global_step, self.num_steps, self._wait_for),
            batch_size=None,
            num_workers=int(on_gpu) if self.num_workers is None else self.num_workers,
            pin_memory=on_gpu,
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),  # else it draws a seed for its processes from the global one
        )

    def val_dataloader(self) -> Any:
        """This process's share of the validation rows, a loader for each source; none where none were given.

        Raises:
            UserError: as :meth:`train_dataloader`.
        """
        self._require_own_sampler()
        sources = () if self.validation is None else self.validation.sources.values()
        return [DataLoader(rows, batch_size=None, shuffle=False) for rows in sources]

    def _require_own_sampler(self) -> None:
        trainer = self.trainer
        if trainer is not None and trainer.world_size > 1 and _replaces_sampler(trainer):
            raise UserError(
                f"Trainer(use_distributed_sampler=True): the {trainer.world_size} processes share the rows of each step"
                " already; what Lightning puts in the place of the sampler would deal out steps instead.",
                "Say Trainer(use_distributed_sampler=False, …).",
            )

    def _wait_for(self, step: int) -> None:
        assert self.trainer is not None
        if not getattr(self.rows, "is_streamed", True):  # the processes have nothing to compare; rows of others may
            return
        wait = partial(self.steps.wait_for, step)
        stops = [each for each in self.trainer.callbacks if isinstance(each, GracefulStop)]  # type: ignore[attr-defined]
        if stops:
            stops[0].wait_for(wait)
        else:
            wait(lambda: None)


def _replaces_sampler(trainer: Trainer) -> bool:
    """Whether the trainer was told to (its default) replace samplers; it keeps that to itself."""
    return bool(getattr(getattr(trainer, "_accelerator_connector", None), "use_distributed_sampler", False))
