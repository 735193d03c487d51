"""What happens where memory runs out: smaller micro-batches, and the work again.

In forward and backward nothing has been changed but the gradients, so the whole step is done again with half the rows
in memory, on all processes. It ends the run where that cannot be: in the sum of the gradients, in which the others wait
for this process, and in the optimizer's step, where weights may be changed in part.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanochat_pl.common.console import print_from_any_rank, rank_zero_print
from nanochat_pl.common.errors import SharedError, UserError
from nanochat_pl.common.out_of_memory import is_out_of_memory
from nanochat_pl.distributed import collectives

if TYPE_CHECKING:
    from nanochat_pl.training.module import LMModule

FIX = "Use a smaller model.sequence_len or model.depth, or trainer.activation_checkpointing=true."


def runs_out_of_memory(work: Callable[..., None], *arguments: Any) -> bool:
    """Do the work, and say whether memory ran out in it. The exception is gone then, with the tensors it would keep."""
    try:
        work(*arguments)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return True
    return False


def release_memory(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def halve_device_batch_size(stage: LMModule, ran_out: bool) -> None:
    """Drop the gradients, free memory, and take half the rows at once from now on. All processes call it.

    Args:
        stage: whose ``device_batch_size`` is halved.
        ran_out: whether memory ran out on this process.

    Raises:
        SharedError: there was one row.
    """
    answers = collectives.all_gather_str("x" if ran_out else "")
    where = f" on process {', '.join(str(rank) for rank, x in enumerate(answers) if x)}" if len(answers) > 1 else ""
    stage.optimizer.zero_grad()
    release_memory(stage.device)
    rows, what = stage.device_batch_size, f"step {stage.global_step + 1}: out of memory{where}"
    if rows == 1:
        one = f"{what}, with one row of {stage.recipe.model.sequence_len:,} tokens at once."
        # One process looks, since another machine may not see the files.
        raise SharedError(one, fix=FIX + collectives.broadcast_str(_goes_on_from(stage)))
    stage.device_batch_size = stage.max_rows = rows // 2
    rank_zero_print(f"{what} with device_batch_size={rows}: the step is done again, and all go on with {rows // 2}.")


@contextlib.contextmanager
def out_of_memory_hint(stage: LMModule, where: str) -> Iterator[None]:
    """Where memory runs out inside, say where the run can go on from.

    Args:
        stage: has the files.
        where: the rest of the sentence "out of memory …".
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        what = f"step {stage.global_step + 1}: out of memory {where}."
        raise UserError(what, fix=FIX + _goes_on_from(stage)) from error


def _goes_on_from(stage: LMModule) -> str:
    return next((f" The same command goes on from {path}." for path in stage.resume_files()), "")


class ChunkOnOOM:
    """Work on rows without gradients, in pieces of half the size each time that memory runs out. Of this process alone.

    Args:
        what: it is, for what is said.

    Attributes:
        most: rows at once; None: as many as are given.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.most: int | None = None

    def __call__(self, work: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """``work(*rows)``: each result is (B, …), the pieces' one after the other.

        Args:
            work: on tensors (B, …); does nothing that must not be done twice.
            rows: tensors (B, …).

        Raises:
            UserError: memory does not suffice for one row.
        """
        while True:
            results: list[Tensor] = []
            size = self.most or len(rows[0])
            for piece in zip(*(tensor.split(size) for tensor in rows), strict=True):
                if runs_out_of_memory(_append, results, work, piece):
                    break
            else:
                return results[0] if len(results) == 1 else torch.cat(results)
            results.clear()
            release_memory(rows[0].device)
            if size == 1:
                raise UserError(f"{self.what}: out of memory with one row of {rows[0].shape[1]:,} tokens.", fix=FIX)
            self.most = size // 2
            print_from_any_rank(f"{self.what}: out of memory with {size} rows at once, goes on with {self.most}.")


def _append(results: list[Tensor], work: Callable[..., Tensor], rows: tuple[Tensor, ...]) -> None:
    results.append(work(*rows))
