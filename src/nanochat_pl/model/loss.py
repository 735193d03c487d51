"""From the head's output to nats per token. All of it in float32: a softcap in bfloat16 costs three digits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanochat_pl.common.constants import IGNORE_INDEX


def softcap(logits: Tensor, cap: float) -> Tensor:
    """``cap * tanh(logits / cap)`` in float32, of logits in any type."""
    return cap * torch.tanh(logits.float() * (1 / cap))


class SoftcapCrossEntropy(torch.autograd.Function):
    """Cross entropy of softcapped logits, with the backward written out.

    Kept for the backward are the logits as they came, in their own type, and a number per token; what is float32 is
    made twice and never stored. (Left to autograd, some float32 tensors of the logits' size live from the forward to
    the backward, and a small model trains noticeably slower on a CPU.)
    """

    @staticmethod
    def forward(ctx: Any, raw: Tensor, targets: Tensor, cap: float) -> Tensor:
        """raw (N, V), targets int64 (N,) → float32 (N,) nats, 0 where the target is ignored."""
        # The cap bounds every exponent, so no maximum needs to be taken off first.
        log_total = softcap(raw, cap).exp().sum(dim=-1).log()
        of_target = softcap(raw.gather(1, targets.clamp(min=0)[:, None])[:, 0], cap)
        ctx.save_for_backward(raw, targets, log_total)
        ctx.cap = cap
        return torch.where(targets != IGNORE_INDEX, log_total - of_target, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        raw, targets, log_total = ctx.saved_tensors
        gradient = torch.where(targets != IGNORE_INDEX, gradients[0], 0.0)[:, None]
        capped = softcap(raw, ctx.cap)
        probability = (capped - log_total[:, None]).exp()
        is_target = torch.arange(raw.size(1), device=raw.device) == targets[:, None]
        slope = 1 - (capped * (1 / ctx.cap)).square()
        return ((probability - is_target.float()) * slope * gradient).to(raw.dtype), None, None


def token_losses(raw: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Nats of each target under the softcapped logits.

    Args:
        raw: logits before the softcap, (B, T, V).
        targets: int64 (B, T); ``IGNORE_INDEX`` where nothing is to be learnt.
        cap: of the softcap.

    Returns:
        float32 (B, T), 0 where the target is ignored.
    """
    losses: Tensor = SoftcapCrossEntropy.apply(raw.flatten(0, 1), targets.flatten(), cap)
    return losses.view_as(targets)
