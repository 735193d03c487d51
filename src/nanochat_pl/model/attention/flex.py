"""The backend ``flex``: FlexAttention, kernels that the compiler makes for a mask. In compiled training on GPUs.

Not compiled it would make the whole matrix of scores, and each length that an evaluation has would be compiled anew; on
CPUs it has no backward. Which blocks of 128 × 128 are seen follows from the first and last document of each block, so
no mask of T × T is made, and documents are values: others compile nothing again.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from nanochat_pl.model.attention.backend import Case, Documents, Kernels

BLOCK_SIZE = 128


def attend(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, documents: Documents | None) -> Tensor:
    """See :class:`~nanochat_pl.model.attention.backend.Backend`."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    length, numbers = q.size(2), None if documents is None else documents.numbers

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        band = (key <= query) & (query - key <= window)
        return band if numbers is None else band & (numbers[row, query] == numbers[row, key])

    some, every = block_pairs(length, window, numbers, q.device)
    partial, whole = _ordered(some & ~every), _ordered(every)
    mask = BlockMask.from_kv_blocks(
        *partial, *whole, BLOCK_SIZE=BLOCK_SIZE, mask_mod=seen, seq_lengths=(length, length)
    )
    return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))


def block_pairs(length: int, window: int, numbers: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of N blocks of queries and N of keys, where something is seen, and where all is: bool (B or 1, N, N) each."""
    first = torch.arange(0, length, BLOCK_SIZE, device=device)
    last = (first + BLOCK_SIZE - 1).clamp(max=length - 1)
    queries_first, queries_last = first[:, None], last[:, None]
    some = (first <= queries_last) & (queries_first - last <= window)
    # A block that is not full has a mask in any case.
    full = first + BLOCK_SIZE <= length
    every = (last < queries_first) & (queries_last - first <= window) & full & full[:, None]
    if numbers is None:
        return some[None], every[None]
    begins, ends = numbers[:, first], numbers[:, last]
    some = some & (ends[:, None] >= begins[:, :, None])
    every = every & (begins[:, None] == ends[:, :, None])
    return some, every


def _ordered(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, int32 (B, 1, N), and which come first: int32 (B, 1, N, N)."""
    order = pairs.int().argsort(dim=-1, descending=True, stable=True)
    return pairs.sum(dim=-1, dtype=torch.int32)[:, None], order.int()[:, None]


@functools.cache
def has_flex_attention() -> bool:
    """Whether this PyTorch has it."""
    return importlib.util.find_spec("torch.nn.attention.flex_attention") is not None


def cannot(kernels: Kernels, case: Case) -> str | None:
    """Why it cannot compute a case."""
    if kernels.device_type != "cuda":
        return "it has a backward on GPUs alone"
    if not kernels.flex:
        return f"PyTorch {torch.__version__} has no FlexAttention"
    return None if case.compiled else "it is for compiled training"


def unwanted(kernels: Kernels, case: Case) -> str | None:
    """Why it is not taken by itself."""
    return "the window is the whole row: sdpa has kernels for that" if case.is_causal_alone else None
