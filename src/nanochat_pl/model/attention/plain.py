"""The backend ``products``: plain matrix products and a softmax in float32. What all others are held against.

On a CPU and up to ``PRODUCTS_REACH`` positions it is the one that is taken: there it takes half the time of the fused
kernel, whose tiles are made for long rows. Over a cache a CPU takes it at any length. With it a token has the same bits
however its text is cut and whatever stands beside it, if matrix products have that quality (in bfloat16 they do on CPUs
without AMX, in float32 they do not; ``selftest`` prints it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat_pl.model.attention.backend import Case, Kernels
from nanochat_pl.model.query_blocks import PRODUCTS_REACH


def unwanted(kernels: Kernels, case: Case) -> str | None:
    """Why it is not taken by itself."""
    if kernels.device_type == "cpu" and case.length <= PRODUCTS_REACH:
        return None
    return f"it is for CPUs and rows of at most {PRODUCTS_REACH:,} positions"


def products(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Scores, softmax in float32, weighted sum. Shapes as in :func:`sdpa`.

    The mask broadcasts to (B, G, H/G, Tq, Tk). It is bool, or what is added to the scores: float32, 0 or -inf; the
    result has the same bits.
    """
    batch, _, queries, width = q.shape
    # Queries that share keys are rows of one product: (B · G, H/G · Tq, D).
    rows, keys, values = q.reshape(batch * k.size(1), -1, width), k.flatten(0, 1), v.flatten(0, 1)
    scores = torch.bmm(rows, keys.transpose(1, 2)).view(batch, k.size(1), -1, queries, k.size(2))
    if mask.is_floating_point():
        scores = torch.add(mask, scores, alpha=scale)  # one operation for three: it is what decoding has many of
    else:
        scores = (scores.float() * scale).masked_fill(~mask, -torch.inf)
    shares = scores.softmax(dim=-1).to(v.dtype)
    return torch.bmm(shares.view(len(rows), -1, k.size(2)), values).view(batch, -1, queries, width)
