"""Causal attention with windows, over a whole row. No T × T mask is ever made.

Shapes: B rows, T positions, H query heads, G key/value heads, D head width, w window.

Queries go in blocks against the band of keys that they can see. Two backends, in a fixed order of preference: on a CPU
and up to ``PRODUCTS_REACH`` positions plain matrix products (there they take half the time of the fused kernel, whose
tiles are made for long rows), else PyTorch's ``scaled_dot_product_attention``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries of a block: with plain products always, with sdpa where the window is narrower.
BLOCK = 128
PRODUCTS_REACH = 1024


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
    products_win = q.device.type == "cpu" and length <= PRODUCTS_REACH
    if window >= length - 1 and not products_win:
        return sdpa(q, k, v, scale, causal=True)
    attend = products if products_win else sdpa
    outputs = []
    for start, stop, first in band_blocks(length, window, products_win):
        mask = band_mask(stop - start, stop - first, start - first, window, q.device)
        outputs.append(attend(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], scale, mask))
    return torch.cat(outputs, dim=2)


def band_blocks(length: int, window: int, with_products: bool) -> list[tuple[int, int, int]]:
    """Blocks of queries (start, stop), each with the first of the keys up to ``stop`` that one of them can see."""
    block = BLOCK if with_products else max(window, BLOCK)
    return [(start, min(start + block, length), max(0, start - window)) for start in range(0, length, block)]


def band_mask(num_queries: int, num_keys: int, offset: int, window: int, device: torch.device) -> Tensor:
    """bool (num_queries, num_keys): query i is at key position i + offset and sees itself and ``window`` before it."""
    queries = torch.arange(num_queries, device=device)[:, None] + offset
    keys = torch.arange(num_keys, device=device)
    return (keys <= queries) & (keys >= queries - window)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """PyTorch's attention. q (B, H, Tq, D), k and v (B, G, Tk, D), mask bool (…, Tq, Tk) → (B, H, Tq, D)."""
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def products(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Scores, softmax in float32, weighted sum. Shapes as in :func:`sdpa`, mask bool (Tq, Tk)."""
    groups = k.size(1)
    # Queries that share keys are rows of one product: (B, G, H/G · Tq, D).
    rows = q.unflatten(1, (groups, -1)).flatten(2, 3)
    scores = (rows @ k.transpose(-2, -1)).float().unflatten(2, (-1, q.size(2))) * scale
    shares = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).to(v.dtype)
    return (shares.flatten(2, 3) @ v).unflatten(2, (-1, q.size(2))).flatten(1, 2)
