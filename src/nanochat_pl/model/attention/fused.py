"""PyTorch's ``scaled_dot_product_attention``, which picks a fused kernel of its own by device and type.

The backend ``sdpa`` is one call of it where all positions before are seen; the backend ``bands`` calls it block by
block with masks (:mod:`~nanochat_pl.model.attention.blocks`), everywhere.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nanochat_pl.model.attention.backend import Case, Documents, Kernels


def attend(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, documents: Documents | None) -> Tensor:
    """All positions before: see :class:`~nanochat_pl.model.attention.backend.Backend`."""
    return sdpa(q, k, v, scale, causal=True)


def cannot(kernels: Kernels, case: Case) -> str | None:
    """Why one call does not compute a case."""
    return None if case.is_causal_alone else "a mask would shut its flash kernels out"


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """PyTorch's attention. q (B, H, Tq, D), k and v (B, G, Tk, D), mask bool (…, Tq, Tk) → (B, H, Tq, D)."""
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
