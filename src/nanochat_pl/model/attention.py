"""Causal attention with windows, over a whole row. No T × T mask is ever made.

Shapes: B rows, T positions, H query heads, G key/value heads, D head width, w window.

Queries go in blocks of w positions against the band of keys that they can see: at most 2w. Full layers need no mask at
all. Backends other than PyTorch's own (``sdpa``) get their place here, in a fixed order of preference, each proved by
a small forward and backward before it is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Windows narrower than this are still cut into blocks of this many queries: a block a query would crawl.
MIN_BLOCK = 64


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """PyTorch's attention. q (B, H, Tq, D), k and v (B, G, Tk, D), mask bool (…, Tq, Tk) → (B, H, Tq, D)."""
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Attention of each position to itself and the ``window`` positions before it.

    Args:
        q: (B, H, T, D).
        k, v: (B, G, T, D); query head h uses key/value head h // (H / G).
        window: in positions; T - 1 or more is full causal attention.
        scale: factor on the scores.

    Returns:
        (B, H, T, D)
    """
    length = q.size(2)
    if window >= length - 1:
        return sdpa(q, k, v, scale, causal=True)
    block = max(window, MIN_BLOCK)
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first = max(0, start - window)
        mask = band_mask(stop - start, stop - first, start - first, window, q.device)
        outputs.append(sdpa(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], scale, mask))
    return torch.cat(outputs, dim=2)


def band_mask(num_queries: int, num_keys: int, offset: int, window: int, device: torch.device) -> Tensor:
    """bool (num_queries, num_keys): query i is at key position i + offset and sees itself and ``window`` before it."""
    queries = torch.arange(num_queries, device=device)[:, None] + offset
    keys = torch.arange(num_keys, device=device)
    return (keys <= queries) & (keys >= queries - window)
