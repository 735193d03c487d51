"""From hidden states to nats. All of it in float32: a softcap in bfloat16 costs three digits.

Shapes: N tokens (rows and positions in one), C model width, V vocabulary.

The logits are by far the largest tensors of a small model, so they are made for a piece of the tokens at a time. For
training, :func:`weighted_nats` computes each piece's gradients as soon as it has the piece's logits, and forgets them:
neither are there ever logits of all tokens, nor is any matrix product done twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat_pl.common.constants import IGNORE_INDEX

# Logits of a piece.
PIECE_LOGITS = 2**22


def default_chunk_tokens(vocab_size: int) -> int:
    """Tokens of a piece: some 16 MiB of float32 logits."""
    return max(1, PIECE_LOGITS // vocab_size)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """``cap * tanh(logits / cap)`` in float32, of logits in any type."""
    return cap * torch.tanh(_precise(logits) * (1 / cap))


def _precise(x: Tensor) -> Tensor:
    """In float32; what is finer stays as it is (gradcheck needs float64)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_losses(raw: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Nats of each target under the softcapped logits.

    Args:
        raw: logits before the softcap, (…, V).
        targets: int64 (…); ``IGNORE_INDEX`` where nothing is to be learnt.
        cap: of the softcap. It bounds every exponent, so no maximum needs to be taken off first.

    Returns:
        float32 (…), 0 where the target is ignored.
    """
    capped = softcap(raw, cap)
    of_target = capped.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets != IGNORE_INDEX, capped.exp().sum(dim=-1).log() - of_target, 0.0)


def weighted_nats(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, cap: float, pieces: int) -> Tensor:
    """Sum over the targets of weight times nats, with gradients for ``hidden`` and ``head``.

    Args:
        hidden: (N, C), what the head reads.
        head: float32 (V, C); it is cast to the type of ``hidden``.
        targets: int64 (N,); ``IGNORE_INDEX`` where nothing is to be learnt.
        weights: float32 (N,); they get no gradient.
        cap: of the softcap.
        pieces: to cut the tokens into.

    Returns:
        A float32 scalar.
    """
    total: Tensor = _WeightedNats.apply(hidden, head, targets, weights, cap, pieces)
    return total


class _WeightedNats(torch.autograd.Function):
    """The gradients are computed in the forward; the backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, cap: float, pieces: int
    ) -> Tensor:
        weights = torch.where(targets != IGNORE_INDEX, weights, 0.0)
        matrix = head.to(hidden.dtype)
        total, of_hidden = weights.new_zeros(()), []
        of_head = torch.zeros_like(head)
        for x, target, weight in zip(*(t.chunk(pieces) for t in (hidden, targets, weights)), strict=True):
            nats, of_logits = _nats_and_gradient(x @ matrix.T, target.clamp(min=0), weight, cap)
            total += (weight * nats).sum()
            of_hidden.append(of_logits @ matrix)
            # The pieces are summed in the type in which the weight is kept.
            if of_head.dtype == of_logits.dtype:
                of_head.addmm_(of_logits.T, x)
            else:
                of_head += of_logits.T @ x
        ctx.save_for_backward(torch.cat(of_hidden), of_head)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_head = ctx.saved_tensors
        return of_hidden * gradient.to(of_hidden.dtype), of_head * gradient, None, None, None, None


def _nats_and_gradient(raw: Tensor, targets: Tensor, weights: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Nats (n,) of targets (n,), and the gradient of their weighted sum by the raw logits (n, V), in their type."""
    ratio = torch.tanh(_precise(raw) * (1 / cap))
    exponentials = (cap * ratio).exp()
    sums = exponentials.sum(dim=-1)
    index = targets[:, None]
    ratio_of_target = ratio.gather(1, index)[:, 0]
    nats = sums.log() - cap * ratio_of_target
    # Of the softcap: 1 - ratio². Of the cross entropy: the probability, and one less at the target.
    gradient = (exponentials * (weights / sums)[:, None] * (1 - ratio.square())).to(raw.dtype)
    at_target = weights * torch.expm1(-nats) * (1 - ratio_of_target.square())
    return nats, gradient.scatter_(1, index, at_target.to(raw.dtype)[:, None])
