"""How it is known that memory ran out, on any device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from nanochat_pl.common.errors import UserError

# How those say it whose exception is a plain RuntimeError: a CPU, an Apple GPU, the CUDA driver, cuBLAS, NCCL.
MESSAGES = (
    "DefaultCPUAllocator:",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Failed to CUDA calloc",
    "Cuda failure 2 'out of memory'",
    "Cuda failure 'out of memory'",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


@contextlib.contextmanager
def out_of_memory_explained(what: str, fix: str) -> Iterator[None]:
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
