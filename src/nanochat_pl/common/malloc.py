"""What the C library does with memory that was given back."""

from __future__ import annotations

import ctypes
import os
import sys

# Numbers of mallopt's parameters in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MOST = 2**31 - 1
# A block of this size or more is given back to the system at once.
MMAP_THRESHOLD = 2**30
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next allocation in place of giving it back to the system, from now on.

    A step on a CPU, of a training or of generating, frees and takes the same blocks again each time, and the system
    must fill each page with zeros before the process has it once more. What is free now is given back before. So the
    best moment is after the first step, which may have compiled: a training that kept memory from its start on needed
    15 % more (docs/LOG.md, 2026-12-01).

    Returns:
        Whether it could be set: another C library, or an environment that sets such things itself, is left alone.
    """
    if not sys.platform.startswith("linux") or any(os.environ.get(name) for name in VARIABLES):
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    malloc_trim.argtypes, malloc_trim.restype = (ctypes.c_size_t,), ctypes.c_int
    malloc_trim(0)
    return bool(mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, MOST))
