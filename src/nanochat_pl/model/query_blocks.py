"""Blocks of queries, and the ranges of keys that they are held against: whole numbers, for a plan without torch.

:mod:`nanochat_pl.model.attention.blocks` computes attention in them.
"""

from __future__ import annotations

from typing import TypeAlias

from nanochat_pl.model.config import KEY_GRID

# On a CPU rows of up to so many positions take plain products: see model/attention/plain.py.
PRODUCTS_REACH = 1024
# Queries of a block: with plain products always, with sdpa at least.
BLOCK = 128
# With sdpa a block has as many as the window is wide, up to the larger of two: small blocks compute few pairs outside
# of the window, and the number of blocks is bounded, as a compiler unrolls them.
SDPA_BLOCK, MAX_BLOCKS = 256, 16

# Queries start … stop - 1, and the keys first … last - 1 that they are held against.
Block: TypeAlias = tuple[int, int, int, int]


def band_blocks(length: int, window: int, with_products: bool) -> list[tuple[int, int, int]]:
    """Blocks of queries (start, stop), each with the first of the keys up to ``stop`` that one of them can see."""
    most = max(SDPA_BLOCK, -(-length // MAX_BLOCKS))
    block = BLOCK if with_products else min(max(window, BLOCK), most)
    return [(start, min(start + block, length), max(0, start - window)) for start in range(0, length, block)]


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
