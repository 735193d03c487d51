"""A decode step of fixed structure, as a compiler wants it: one new token a row, nothing written, no choices by value.

What it computes is what :class:`~nanochat_pl.model.kv_cache.CacheStep` does, with another order of sums. The new
token's own key is no part of the cached ones, so that the cache is only read, and its keys and values are handed out.

Shapes: B rows, W different windows, H query heads, G key/value heads, K cached positions (of a window), D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class DecodeStep:
    """One forward of one token a row.

    Args:
        previous: (B, 1, C) embeddings of the tokens before: there is one in each row.
        positions: int64 (B, 1) of the new tokens.
        cached: of each layer keys and values, (B, G, K, D) each, that begin at a position of the layer's window.
        ends: int64 (B,) for each window: how many of these positions come before the row's new token.

    Attributes:
        new: keys, then values, (B, G, D) each, of each layer that has been run.
    """

    def __init__(
        self,
        previous: Tensor,
        positions: Tensor,
        cached: Sequence[tuple[Tensor, Tensor]],
        ends: dict[int, Tensor],
    ) -> None:
        self.positions = positions
        self.new: list[Tensor] = []
        self._previous, self._cached, self._ends = previous, cached, ends

    def previous(self, x: Tensor) -> Tensor:
        """What comes before each position of x, both (B, 1, C)."""
        return self._previous

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
        """Attend to the new token and to the cached ones within the window. Shapes as of :meth:`CacheStep.attend`."""
        self.new += [k[:, :, 0], v[:, :, 0]]
        keys, values = self._cached[layer]
        queries = q.unflatten(1, (k.size(1), -1)).squeeze(3)  # (B, G, H / G, D): those of a head share its keys
        scores = torch.matmul(queries, keys.transpose(2, 3)).float() * scale
        place, end = torch.arange(keys.size(2), device=q.device), self._ends[window][:, None]
        seen = (place < end) & (place >= end - window)
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        own = (queries.float() * k.float()).sum(dim=-1, keepdim=True) * scale
        highest = torch.maximum(scores.amax(dim=-1, keepdim=True), own)
        shares, own_share = torch.exp(scores - highest), torch.exp(own - highest)
        y = torch.matmul(shares.to(v.dtype), values).float() + own_share * v.float()
        y = y / (shares.sum(dim=-1, keepdim=True) + own_share)
        return y.to(v.dtype).view_as(q)
