"""Attention block by block: queries held against the band of keys that they can see. No T × T mask is ever made.

Over a cache, too: there it is the one function of prefill and decoding. Ranges of keys over a cache begin and end at
multiples of ``KEY_GRID``, for the softmax adds its terms in lanes. So cached decoding is bit by bit the forward of the
whole row, if that takes products (it has ``KEY_GRID`` to ``PRODUCTS_REACH`` positions) and windows are multiples of
``KEY_GRID``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nanochat_pl.model.attention.backend import Documents
from nanochat_pl.model.attention.fused import sdpa
from nanochat_pl.model.attention.plain import products
from nanochat_pl.model.query_blocks import Block, band_blocks


def attend_with_products(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, documents: Documents | None
) -> Tensor:
    """The backend ``products``."""
    return _attend(q, k, v, window, scale, documents, with_products=True)


def attend_with_sdpa(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, documents: Documents | None) -> Tensor:
    """The backend ``bands``."""
    return _attend(q, k, v, window, scale, documents, with_products=False)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, documents: Documents | None, with_products: bool
) -> Tensor:
    bands = band_blocks(q.size(2), window, with_products)
    blocks = [(start, stop, first, stop) for start, stop, first in bands]

    def mask_of(start: int, stop: int, first: int, last: int) -> Tensor:
        mask = band_mask(stop - start, last - first, start - first, window, q.device)
        if documents is None:
            return mask
        numbers = documents.numbers
        mask = mask & (numbers[:, start:stop, None] == numbers[:, None, first:last])
        return mask[:, None, None] if with_products else mask[:, None]

    return in_blocks(q, k, v, scale, blocks, mask_of, with_products)


def in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    blocks: Sequence[Block],
    mask_of: Callable[[int, int, int, int], Tensor | None],
    with_products: bool,
) -> Tensor:
    """Attention of blocks of queries, each to a range of keys: the one function of training, prefill and decoding.

    Args:
        q: (B, H, Tq, D).
        k, v: (B, G, Tk, D).
        blocks: which together have all queries.
        mask_of: a block's mask, as :func:`products` or :func:`sdpa` takes it.
        with_products: which of the two it is.

    Returns:
        (B, H, Tq, D)
    """
    outputs = []
    for start, stop, first, last in blocks:
        keys, values, mask = k[:, :, first:last], v[:, :, first:last], mask_of(start, stop, first, last)
        outputs.append(in_one_block(q[:, :, start:stop], keys, values, scale, mask, with_products))
    return torch.cat(outputs, dim=2)


def in_one_block(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, with_products: bool) -> Tensor:
    """Attention of a block of queries to the keys that one of them can see. Shapes as of :func:`sdpa`."""
    if with_products:
        assert mask is not None
        return products(q, k, v, scale, mask)
    return sdpa(q, k, v, scale, mask)


def band_mask(num_queries: int, num_keys: int, offset: int, window: int, device: torch.device) -> Tensor:
    """bool (num_queries, num_keys): query i is at key position i + offset and sees itself and ``window`` before it."""
    queries = torch.arange(num_queries, device=device)[:, None] + offset
    keys = torch.arange(num_keys, device=device)
    return (keys <= queries) & (keys >= queries - window)
