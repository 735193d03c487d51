"""From hidden states to nats. All of it in float32: a softcap in bfloat16 costs three digits.

Shapes: N tokens (rows and positions in one), C model width, V vocabulary.

The logits are by far the largest tensors of a small model, so they are made for a piece of the tokens at a time. For
training, :func:`weighted_nats` computes each piece's gradients as soon as it has the piece's logits, and forgets them:
neither are there ever logits of all tokens, nor is any matrix product done twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat_pl.common.constants import IGNORE_INDEX

# Logits of a piece. 16 MiB of float32 on a CPU: small enough for malloc to use the same memory again, measured fastest.
# A GPU needs long matrices to be busy: 1,024 tokens of a vocabulary of 32,768 (not measured).
PIECE_LOGITS_CPU, PIECE_LOGITS_GPU = 2**22, 2**25


def default_chunk_tokens(vocab_size: int, on_cpu: bool) -> int:
    """Tokens whose logits are in memory at once, where nobody says otherwise."""
    return max(1, (PIECE_LOGITS_CPU if on_cpu else PIECE_LOGITS_GPU) // vocab_size)


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


def weighted_nats(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    vocab_size: int,
    cap: float,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Sum over the targets of weight times nats, with gradients for ``hidden`` and ``head``.

    Args:
        hidden: (N, C), what the head reads.
        head: float32 (V or more, C): rows from V on are padding. It is cast to the type of ``hidden``.
        targets: int64 (N,); ``IGNORE_INDEX`` where nothing is to be learnt.
        weights: float32 (N,); they get no gradient.
        vocab_size: V.
        cap: of the softcap.
        chunk_tokens: tokens whose logits are there at once.

    Returns:
        The sum, a float32 scalar, and what each target has of it, float32 (N,), without gradients.
    """
    pieces = -(-len(hidden) // chunk_tokens)
    compiled = torch.compiler.is_compiling()
    total, _, _, of_targets = _nats_with_gradients(hidden, head, targets, weights, vocab_size, cap, pieces, compiled)
    return total, of_targets.detach()


# An operation of its own, so that a compiler does not unroll the pieces into one long graph: that would take minutes to
# compile. The compiler is given the work on a piece.
@torch.library.custom_op("nanochat_pl::nats_with_gradients", mutates_args=())
def _nats_with_gradients(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    vocab_size: int,
    cap: float,
    pieces: int,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum (), its gradients by hidden and head, of their shapes and types, and its terms (N,)."""
    weights = torch.where(targets != IGNORE_INDEX, weights, 0.0)
    piece_of = _compiled_piece() if compiled else _piece
    matrix = head[:vocab_size].to(hidden.dtype)
    total, of_hidden, of_head = weights.new_zeros(()), torch.empty_like(hidden), torch.zeros_like(head)
    of_matrix, terms = of_head[:vocab_size], torch.empty_like(weights)
    tensors = (hidden, targets.clamp(min=0), weights, of_hidden, terms)
    for x, target, weight, of_x, term in zip(*(tensor.chunk(pieces) for tensor in tensors), strict=True):
        nats, of_logits, nats_of_targets = piece_of(x @ matrix.T, target, weight, cap)
        total += nats
        term.copy_(nats_of_targets)
        torch.mm(of_logits, matrix, out=of_x)
        # The pieces are summed in the type in which the weight is kept.
        if of_matrix.dtype == of_logits.dtype:
            of_matrix.addmm_(of_logits.T, x)
        else:
            of_matrix += of_logits.T @ x
    return total, of_hidden, of_head, terms


@_nats_with_gradients.register_fake
def _(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    vocab_size: int,
    cap: float,
    pieces: int,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return weights.new_empty(()), torch.empty_like(hidden), torch.empty_like(head), torch.empty_like(weights)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], output[2])


def _scale_gradients(ctx: Any, gradient: Tensor | None, *of_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(other is not None for other in of_gradients):
        raise RuntimeError("this loss can be differentiated once, not twice: its gradients are plain numbers")
    if gradient is None:
        return (None,) * 8
    of_hidden, of_head = ctx.saved_tensors
    return of_hidden * gradient.to(of_hidden.dtype), of_head * gradient, *[None] * 6


_nats_with_gradients.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def _piece(raw: Tensor, targets: Tensor, weights: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sum () of weighted nats, its gradient by the raw logits (n, V), which are used up, and its terms (n,)."""
    ratio = _precise(raw).mul_(1 / cap).tanh_()
    of_target = ratio.gather(1, targets[:, None])[:, 0]
    exponentials = (ratio * cap).exp_()
    sums = exponentials.sum(dim=-1)
    nats = sums.log() - cap * of_target
    # Of the cross entropy: the probability, and one less at the target. Of the softcap: 1 - ratio².
    at_target = weights * torch.expm1(-nats) * (1 - of_target.square())
    gradient = exponentials.mul_((weights / sums)[:, None]).mul_(ratio.square_().neg_().add_(1))
    terms = weights * nats
    # Cast last: in bfloat16 a CPU scatters through a float32 copy of the whole.
    return terms.sum(), gradient.scatter_(1, targets[:, None], at_target[:, None]).to(raw.dtype), terms


@functools.cache
def _compiled_piece() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_piece, dynamic=False)
