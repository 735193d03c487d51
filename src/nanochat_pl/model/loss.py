"""From the head's output to nats per token. All of it in float32: a softcap in bfloat16 costs three digits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_pl.common.constants import IGNORE_INDEX


def softcap(logits: Tensor, cap: float) -> Tensor:
    """``cap * tanh(logits / cap)`` in float32, of logits in any type."""
    return cap * torch.tanh(logits.float() / cap)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each token.

    Args:
        logits: float32 (B, T, V).
        targets: int64 (B, T); ``IGNORE_INDEX`` where nothing is to be learnt.

    Returns:
        float32 (B, T) nats, 0 where the target is ignored.
    """
    flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return flat.view_as(targets)
