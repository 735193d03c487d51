"""How much memory a process has taken at most, asked without waiting for the device."""

from __future__ import annotations

import sys

import torch

COLUMNS = ("train/peak_memory_gib", "train/reserved_memory_gib")
_GIB = 2.0**30


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory so far, in GiB.

    - CUDA: what tensors have taken at most (``peak``), and the allocator for them (``reserved``).
    - mps: what tensors take now, and the driver for them: no peak is kept there.
    - CPU: the largest resident size of the process, libraries included; nothing where the system does not say.
    """
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)  # asked once: it walks all of the allocator's counters
        return _columns(*(stats.get(f"{kind}_bytes.all.peak", 0) for kind in ("allocated", "reserved")))
    if device.type == "mps":
        return _columns(torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory())
    try:
        import resource
    except ImportError:  # Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _columns(peak if sys.platform == "darwin" else peak * 1024)


def _columns(*sizes: float) -> dict[str, float]:
    return {name: size / _GIB for name, size in zip(COLUMNS, sizes, strict=False)}
