"""Attention block by block: queries held against the band of keys that they can see. No T × T mask is ever made.

Over a cache, too: there it is the one function of prefill and decoding. Ranges of keys over a cache begin and end at
multiples of ``KEY_GRID``, for the softmax adds its terms in lanes. So cached decoding is bit by bit the forward of the
whole row, if that takes products (it has ``KEY_GRID`` to ``PRODUCTS_REACH`` positions) and windows are multiples of
``KEY_GRID``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from nanochat_pl.model.attention.backend import Documents
from nanochat_pl.model.attention.fused import sdpa
from nanochat_pl.model.attention.plain import products
from nanochat_pl.model.config import KEY_GRID

# Queries of a block: with plain products always, with sdpa at least.
BLOCK = 128
# With sdpa a block has as many as the window is wide, up to the larger of two: small blocks compute few pairs outside
# of the window, and the number of blocks is bounded, as a compiler unrolls them.
SDPA_BLOCK, MAX_BLOCKS = 256, 16

# Queries start … stop - 1, and the keys first … last - 1 that they are held against.
Block: TypeAlias = tuple[int, int, int, int]


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


def cache_blocks(
    num_queries: int, starts: tuple[int, int], window: int, length: int, with_products: bool, least: int = 0
) -> list[Block]:
    """The blocks of new tokens over a cache of ``length`` positions; ``starts``: the lowest and highest of the rows.

    With products, one query is held against at least so many keys.
    """
    blocks = []
    for start in range(0, num_queries, BLOCK):
        stop = min(start + BLOCK, num_queries)
        first, last = max(0, starts[0] + start - window), starts[1] + stop
        if with_products:
            last = max(last, first + -(-least // (stop - start)))
            first, last = first // KEY_GRID * KEY_GRID, -(-last // KEY_GRID) * KEY_GRID
            first = max(0, min(first, length - -(-least // KEY_GRID) * KEY_GRID))
        blocks.append((start, stop, first, min(last, length)))
    return blocks


def band_blocks(length: int, window: int, with_products: bool) -> list[tuple[int, int, int]]:
    """Blocks of queries (start, stop), each with the first of the keys up to ``stop`` that one of them can see."""
    most = max(SDPA_BLOCK, -(-length // MAX_BLOCKS))
    block = BLOCK if with_products else min(max(window, BLOCK), most)
    return [(start, min(start + block, length), max(0, start - window)) for start in range(0, length, block)]


def band_mask(num_queries: int, num_keys: int, offset: int, window: int, device: torch.device) -> Tensor:
    """bool (num_queries, num_keys): query i is at key position i + offset and sees itself and ``window`` before it."""
    queries = torch.arange(num_queries, device=device)[:, None] + offset
    keys = torch.arange(num_keys, device=device)
    return (keys <= queries) & (keys >= queries - window)
