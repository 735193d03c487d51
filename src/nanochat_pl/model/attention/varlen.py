"""The backend ``varlen``: PyTorch's own flash kernels, which know windows and documents. On GPUs, in 16 bits.

They take all rows as one long text with ends. Below them FlashAttention 3 or 4 may take the place of the FlashAttention
2 that PyTorch has (:func:`activate_newer_kernels`).
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_pl.common.errors import first_line
from nanochat_pl.model.attention.backend import Case, Documents, Kernels

# Newer kernels by PyTorch's names for them: their package, and the compute capabilities that PyTorch lets them run on.
NEWER_KERNELS = {"FA3": ("flash_attn_interface", (9,)), "FA4": ("flash_attn.cute", (9, 10))}


def attend(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, documents: Documents | None) -> Tensor:
    """See :class:`~nanochat_pl.model.attention.backend.Backend`."""
    from torch.nn.attention.varlen import varlen_attn

    rows, _, length, _ = q.shape
    if documents is None:
        ends = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=q.device)
    else:
        assert documents.ends is not None, "documents of rows that varlen is to take have their ends"
        ends = documents.ends
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    grouped = q.size(1) != k.size(1)
    y = varlen_attn(q, k, v, ends, ends, length, length, scale=scale, window_size=(window, 0), enable_gqa=grouped)
    return cast(Tensor, y).unflatten(0, (rows, length)).transpose(1, 2)


def document_ends(numbers: Tensor) -> Tensor:
    """The ``ends`` of :class:`Documents` with these numbers, int32 (B, T). It waits for the device once.

    Their number is a shape, of which compiled graphs have one each: as a power of two it takes few values. What is
    repeated at the end are documents without tokens.
    """
    rows, length = numbers.shape
    starts = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True).flatten().nonzero()[:, 0]
    size = 1 << max(len(starts), 63).bit_length()
    return F.pad(starts.int(), (0, size - len(starts)), value=rows * length)


def cannot(kernels: Kernels, case: Case) -> str | None:
    """Why there are no flash kernels with windows for a case; None: there are."""
    dtype, head_dim = case.dtype, case.head_dim
    if kernels.device_type != "cuda" or kernels.capability is None:
        return "it is for GPUs of NVIDIA"
    if kernels.capability < (8, 0):
        return "it needs compute capability 8.0, the GPU has {}.{}".format(*kernels.capability)
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
    # Of the backward of wider heads only the data center's GPUs have enough shared memory for.
    widest = 256 if kernels.capability in ((8, 0), (9, 0), (10, 0)) else 192
    if head_dim % 8 or head_dim > widest:
        return f"it takes heads whose width is a multiple of 8 up to {widest}, not {head_dim}"
    if not kernels.varlen:
        return f"PyTorch {torch.__version__} has no varlen_attn with windows"
    return None


def unwanted(kernels: Kernels, case: Case) -> str | None:
    """Why it is not taken by itself."""
    return "the window is the whole row: sdpa has the same kernels" if case.is_causal_alone else None


@functools.cache
def has_varlen_with_windows() -> bool:
    """Whether this PyTorch has ``varlen_attn`` with all that is asked of it: the signature tells, not the version."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "scale", "enable_gqa"} <= {*inspect.signature(varlen_attn).parameters}


def activate_newer_kernels(device: torch.device, works: Callable[[], str | None]) -> dict[str, str | None]:
    """Let FlashAttention 3 or 4, where it is installed and runs, compute what flash kernels of this process compute.

    Args:
        device: a GPU of NVIDIA.
        works: says what is wrong with the kernels that are active; None: nothing.

    Returns:
        what speaks against each; None: it is active. What comes after that one is not tried.
    """
    try:
        from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl
    except ImportError:
        return dict.fromkeys(NEWER_KERNELS, f"PyTorch {torch.__version__} has no activate_flash_attention_impl")
    major, reasons = torch.cuda.get_device_capability(device)[0], dict[str, str | None]()
    for name, (package, capabilities) in NEWER_KERNELS.items():
        if not _is_installed(package):
            reasons[name] = f"{package} is not installed"
        elif major not in capabilities:
            reasons[name] = f"it is for compute capability {' and '.join(f'{each}.x' for each in capabilities)}"
        else:
            try:
                activate_flash_attention_impl(name)
                reasons[name] = works()
            except Exception as error:  # whatever a package that was built for another PyTorch makes of it
                reasons[name] = first_line(error)[:160]
            if reasons[name] is None:
                break
            restore_flash_attention_impl()
    return reasons


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # the package above it is not there
        return False
