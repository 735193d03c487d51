"""Rows that branch: a beginning and several continuations of it in one forward, without a cache and without padding.

A continuation sees the beginning and itself, as if it alone stood behind it. All that works on single tokens (matrix
products, norms) gets the tokens of all rows in one line; rows are padded for attention alone.

Shapes: B rows, L tokens of the longest, N tokens of all, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_pl.model.attention import products, sdpa, windowed_attention
from nanochat_pl.model.query_blocks import BLOCK, PRODUCTS_REACH


@dataclass(frozen=True)
class SharedPrefix:
    """A row: the tokens of the beginning (``trunk``), and those of each continuation (``branches``, maybe none)."""

    trunk: Sequence[int]
    branches: Sequence[Sequence[int]] = ()


class PrefixTree:
    """The tokens of one forward, row after row, in a row the trunk first.

    Attributes:
        ids: int64 (1, N).
        positions: int64 (1, N): of each token in the text that it stands in.
        starts: place among the N tokens of each row's trunk and then of each of its branches.
    """

    def __init__(self, rows: Sequence[SharedPrefix], device: torch.device | str = "cpu") -> None:
        ids: list[int] = []
        positions: list[int] = []
        before: list[int] = []  # place of the token before each; -1 where there is none
        branch: list[int] = []  # number within the row, the trunk's is 0
        self.starts: list[list[int]] = []
        lengths = []
        for row in rows:
            first = len(ids)
            self.starts.append([])
            for number, tokens in enumerate([row.trunk, *row.branches]):
                start, depth = len(ids), len(row.trunk) if number else 0
                self.starts[-1].append(start)
                ids += tokens
                positions += range(depth, depth + len(tokens))
                before += [first + depth - 1 if depth else -1, *range(start, start + len(tokens) - 1)][: len(tokens)]
                branch += [number] * len(tokens)
            lengths.append(len(ids) - first)
        self.ids = torch.tensor([ids], dtype=torch.int64, device=device)
        self.positions = torch.tensor([positions], dtype=torch.int64, device=device)
        self._before = torch.tensor(before, dtype=torch.int64, device=device)
        self._branched = any(row.branches for row in rows)
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        self._shape = tuple(real.shape)
        self._index = tuple(index.to(device) for index in real.nonzero(as_tuple=True))
        # Padding is a branch of its own, so that nothing sees it and it sees something.
        self._branch = self._padded(torch.tensor(branch, device=device), -1)
        self._position = self._padded(self.positions[0], 0)
        lowest = torch.where(real.to(device), self._position, len(ids)).amin(dim=0)
        self._lowest = [int(block.min()) for block in lowest.split(BLOCK)]
        self._masks: dict[tuple[int, int], Tensor] = {}

    def _padded(self, values: Tensor, fill: int) -> Tensor:
        """(N, …) → (B, L, …)"""
        padded = values.new_full((*self._shape, *values.shape[1:]), fill)
        padded[self._index] = values
        return padded

    def previous(self, x: Tensor) -> Tensor:
        """Of each token what the one before it in its text has in x (1, N, C); zeros where there is none."""
        return x[:, self._before.clamp(min=0)] * (self._before >= 0)[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
        """Attention of each token to itself and the ``window`` tokens before it in its text.

        Args:
            layer: not of interest.
            q: (1, H, N, D).
            k, v: (1, G, N, D).

        Returns:
            (1, H, N, D)
        """
        q, k, v = (self._padded(each[0].transpose(0, 1), 0).transpose(1, 2) for each in (q, k, v))
        y = self._attend(q, k, v, window, scale) if self._branched else windowed_attention(q, k, v, window, scale)
        return y.transpose(1, 2)[self._index].transpose(0, 1)[None]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
        """As :meth:`attend`, on padded rows: q (B, H, L, D), k and v (B, G, L, D)."""
        with_products = q.device.type == "cpu" and q.size(2) <= PRODUCTS_REACH
        outputs = []
        for start in range(0, q.size(2), BLOCK):
            stop = min(start + BLOCK, q.size(2))
            # No token stands in a row before its place in its text: all keys that a query sees are from here on.
            first = max(0, self._lowest[start // BLOCK] - window)
            queries, keys, values = q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop]
            mask = self._mask(start, stop, first, window)
            if with_products:
                outputs.append(products(queries, keys, values, scale, mask[:, None, None]))
            else:
                outputs.append(sdpa(queries, keys, values, scale, mask[:, None]))
        return torch.cat(outputs, dim=2)

    def _mask(self, start: int, stop: int, first: int, window: int) -> Tensor:
        """bool (B, queries, keys), the same for all layers of one window."""
        if (mask := self._masks.get((start, window))) is None:
            position, branch = self._position, self._branch
            queries, keys = position[:, start:stop, None], position[:, None, first:stop]
            mask = (keys <= queries) & (keys >= queries - window)
            own, other = branch[:, start:stop, None], branch[:, None, first:stop]
            mask &= (other == own) | (other == 0)
            self._masks[start, window] = mask
        return mask
