"""How it is known that memory ran out, on any device."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from nanochat_pl.common.errors import UserError

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
