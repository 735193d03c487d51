"""Batch invariance: which numbers of rows and keys give a token the same bits on this machine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_pl.model.attention import in_one_block, windowed_attention
from nanochat_pl.model.config import KEY_GRID

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 256)
SHAPES = ((256, 256), (1024, 256), (256, 1024), (4096, 256))
LENGTHS = (16, 17, 31, 32, 33, 64, 100, 128, 200, 256)
HEADS, WIDTH, LENGTH = 4, 64, 256
QUERIES = (1, 4)


def describe(dtype: torch.dtype, device: torch.device) -> str:
    """What was found of one type, in words."""
    classes = classes_of(dict(zip(ROWS, rows_of_linears(dtype, device), strict=True)))
    rows = f"in products of {ROWS[0]} … {ROWS[-1]} rows"
    if len(classes) > 1:
        rows = f"within {', '.join(map(_range, classes))} rows"
    words = []
    for count in QUERIES:
        other = unequal_lengths(dtype, device, count)
        found = f"other bits at {len(other)} of {len(LENGTHS)} lengths" if other else "the bits of the whole row"
        words.append(f"{found} with {count} {'query' if count == 1 else 'queries'}")
    return f"a row has the same bits {rows}; attention over a cache has {', '.join(words)}"


def rows_of_linears(dtype: torch.dtype, device: torch.device) -> list[list[Tensor]]:
    """What linear maps of some shapes make of the same rows, so many at a time."""
    generator = torch.Generator().manual_seed(0)
    found: list[list[Tensor]] = [[] for _ in ROWS]
    for outputs, inputs in SHAPES:
        weight, x = (torch.randn(n, inputs, generator=generator).to(device, dtype) for n in (outputs, math.lcm(*ROWS)))
        for results, count in zip(found, ROWS, strict=True):
            results.append(torch.cat([F.linear(part, weight) for part in x.split(count)]))
    return found


def classes_of(results: dict[int, list[Tensor]]) -> list[list[int]]:
    """The numbers whose results are equal bit by bit, together."""
    classes: list[list[int]] = []
    for number, own in results.items():
        for each in classes:
            if all(map(torch.equal, own, results[each[0]])):
                each.append(number)
                break
        else:
            classes.append([number])
    return classes


def unequal_lengths(dtype: torch.dtype, device: torch.device, num_queries: int) -> list[int]:
    """The lengths of texts whose last token has other bits over a cache than within the whole row.

    Args:
        num_queries: of the product, the first of them the token's.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, LENGTH, WIDTH)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    whole, wrong = windowed_attention(q, k, v, LENGTH, 0.125), []
    with_products = device.type == "cpu"
    for length in LENGTHS:
        seen = -(-length // KEY_GRID) * KEY_GRID
        mask = torch.arange(seen, device=device) < length
        query = q[:, :, length - 1 : length].expand(-1, -1, num_queries, -1)
        mask_of = torch.where(mask, 0.0, -torch.inf) if with_products else mask.expand(num_queries, -1)
        found = in_one_block(query, k[:, :, :seen], v[:, :, :seen], 0.125, mask_of, with_products)
        if not torch.equal(found[:, :, 0], whole[:, :, length - 1]):
            wrong.append(length)
    return wrong


def _range(numbers: Sequence[int]) -> str:
    return f"{{{numbers[0]}}}" if len(numbers) == 1 else f"{{{numbers[0]} … {numbers[-1]}}}"
