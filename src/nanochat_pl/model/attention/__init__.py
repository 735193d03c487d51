"""Causal attention with windows: of whole rows, and of new tokens over a cache. No T × T mask is ever made.

One file for each backend of whole rows, in a fixed order of preference (:mod:`~nanochat_pl.model.attention.choice`):

- ``products`` (``plain``): matrix products, of blocks of queries against the band of keys that they can see. On CPUs.
- ``sdpa`` (``fused``): PyTorch's ``scaled_dot_product_attention`` in one call, where all positions before are seen.
- ``varlen``: PyTorch's flash kernels, which know windows and documents. On GPUs, in 16 bits.
- ``flex``: FlexAttention. In compiled training on GPUs.
- ``bands`` (``blocks``): ``scaled_dot_product_attention`` block by block, with masks. Everywhere.

Over a cache a CPU takes ``products`` at any length, other devices ``sdpa`` (``blocks``).

Shapes: B rows, T positions, H query heads, G key/value heads, D head width, w window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat_pl.model.attention.backend import BackendName, Case, Documents, Kernels
from nanochat_pl.model.attention.blocks import band_mask, in_blocks, in_one_block
from nanochat_pl.model.attention.choice import (
    BACKENDS,
    attention_backend,
    choose,
    choose_in_graph,
    kernels_of,
    why_not,
)
from nanochat_pl.model.attention.fused import sdpa
from nanochat_pl.model.attention.plain import products
from nanochat_pl.model.config import KEY_GRID, AttentionBackend

__all__ = [
    "BACKENDS",
    "KEY_GRID",
    "AttentionBackend",
    "BackendName",
    "Case",
    "Documents",
    "Kernels",
    "attention_backend",
    "band_mask",
    "choose",
    "choose_in_graph",
    "in_blocks",
    "in_one_block",
    "kernels_of",
    "products",
    "sdpa",
    "why_not",
    "windowed_attention",
]


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scale: float,
    documents: Documents | None = None,
    wanted: AttentionBackend = "auto",
) -> Tensor:
    """Attention of each position to itself and the ``window`` positions before it.

    Args:
        q: (B, H, T, D).
        k, v: (B, G, T, D); query head h uses key/value head h // (H / G).
        window: in positions; T - 1 or more is full causal attention.
        scale: factor on the scores.
        documents: a position sees those of its own alone. None: all of a row are of one.
        wanted: the backend for what it can compute.

    Returns:
        (B, H, T, D)
    """
    case = (q.dtype, window, q.size(2), q.size(3), documents is not None, torch.compiler.is_compiling())
    return BACKENDS[choose_in_graph(q.device, wanted, *case)].attend(q, k, v, window, scale, documents)
