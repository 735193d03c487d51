"""How it is known that memory ran out, on any device; and work that is done again in smaller pieces where it did."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nanochat_pl.common.console import print_from_any_rank
from nanochat_pl.common.errors import UserError

FIX = "Use trainer.activation_checkpointing=true, or a smaller model: of stage=base model.sequence_len or model.depth."

# How those say it whose exception is a plain RuntimeError, or one of another kind that wraps it.
MESSAGES = re.compile(
    "|".join(
        (
            "DefaultCPUAllocator:",
            r"std::bad_alloc",
            # Caching allocators: CUDA's, HIP's, XPU's, an Apple GPU's, which also names a buffer that it cannot have.
            r"(CUDA|HIP|XPU) out of memory",
            r"MPS backend out of memory",
            r"Invalid buffer size",
            # Drivers and runtimes, as PyTorch, Triton and the compiler pass them on.
            r"(CUDA|HIP)( driver)? error: out of memory",
            r"Triton Error \[(CUDA|HIP)\]: out of memory",
            r"(cudaError|hipError|CUDA_ERROR_)(MemoryAllocation|OutOfMemory|OUT_OF_MEMORY)",
            # Libraries: cuBLAS, cuBLASLt, cuDNN, cuSOLVER, hipBLAS, rocBLAS, MIOpen.
            r"(CUBLAS|CUSOLVER|CUSPARSE|CUFFT|HIPBLAS)_STATUS_ALLOC_FAILED",
            r"CUDNN_STATUS_ALLOC_FAILED",
            r"CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
            r"rocblas_status_memory_error",
            r"miopenStatusAllocFailed",
            # NCCL.
            r"Failed to (CUDA|hip) (calloc|malloc)",
            r"(Cuda|HIP) failure (2 )?'out of memory'",
        )
    )
)
MAX_CAUSES = 16  # a chain of exceptions that wrap each other is not followed further


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device, or was raised because of one that does."""
    seen: BaseException | None = error
    for _ in range(MAX_CAUSES):
        if seen is None:
            return False
        if isinstance(seen, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(seen, RuntimeError) and MESSAGES.search(str(seen)):
            return True
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return False


@contextlib.contextmanager
def explain_out_of_memory(what: str, fix: str) -> Iterator[None]:
    """Where memory runs out inside, a :class:`UserError` says so, on which processes can agree.

    Args:
        what: it happened in.
        fix: what to do.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{what}: out of memory.", fix) from error


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
