"""From hidden states to nats. All of it in float32: a softcap in bfloat16 costs three digits.

Shapes: N tokens (rows and positions in one), C model width, V vocabulary.

The logits are by far the largest tensors of a small model, so they are made for a piece of the tokens at a time. For
training, :func:`fused_linear_cross_entropy` computes each piece's gradients as soon as it has the piece's logits, and
forgets them: neither are there ever logits of all tokens, nor is any matrix product done twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat_pl.common.compiling import twin
from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.common.vector_math import call_each_once

call_each_once()  # now, before threads do it: all that computes with a model loads this


def softcap(logits: Tensor, cap: float) -> Tensor:
    """``cap * tanh(logits / cap)`` in float32, of logits in any type."""
    return cap * tanh_of(_precise(logits) * (1 / cap))


def tanh_of(x: Tensor) -> Tensor:
    """tanh of a tensor that nobody needs any more: its memory may become the result's."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        # Within 2e-7 of it. The compiler's tanh takes four times as long.
        power = torch.expm1((2 * x).clamp(max=20))
        return power / (power + 2)
    return x.tanh_()


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
    nats = nats_of_logits(softcap(raw, cap), targets.clamp(min=0))
    return torch.where(targets != IGNORE_INDEX, nats, 0.0)


def nats_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target, minus its log-probability, of softcapped logits: float32 (…, V), int64 (…) → float32 (…).

    The formula of the training (:func:`_chunk`), operation by operation: where neither is compiled, what generates and
    what trains give a token the same bits.
    """
    return log_normaliser(logits) - logits.gather(-1, targets[..., None])[..., 0]


def log_normaliser(logits: Tensor) -> Tensor:
    """What is taken from softcapped logits, float32 (…, V), to make them log-probabilities: float32 (…)."""
    return by_rows(lambda rows: rows.exp().sum(dim=-1).log(), logits)


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A sum over each row of x (…, V) → (…), with the same bits for one row as for many.

    The sum of a single row would be split between threads, and rounded in other places.
    """
    if x.numel() == x.size(-1):
        return function(x.reshape(1, -1).expand(2, -1))[:1].view(x.shape[:-1])
    return function(x)


def fused_linear_cross_entropy(
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
        The sum, a float32 scalar, and the nats of each target, float32 (N,), without weight and without gradients;
        those of ignored targets mean nothing.
    """
    pieces = -(-len(hidden) // chunk_tokens)
    compiled = torch.compiler.is_compiling()
    total, _, _, nats = _nats_with_gradients(hidden, head, targets, weights, vocab_size, cap, pieces, compiled)
    return total, nats.detach()


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
    """The sum (), its gradients by hidden and head, of their shapes and types, and the nats of each target (N,)."""
    weights = torch.where(targets != IGNORE_INDEX, weights, 0.0)
    piece_of = compiled_piece(hidden.device, hidden.dtype, -(-len(hidden) // pieces)) if compiled else _chunk
    matrix = head[:vocab_size].to(hidden.dtype)
    total, of_hidden, of_head = weights.new_zeros(()), torch.empty_like(hidden), torch.zeros_like(head)
    of_matrix, nats = of_head[:vocab_size], torch.empty_like(weights)
    tensors = (hidden, targets.clamp(min=0), weights, of_hidden, nats)
    for x, target, weight, of_x, of_target in zip(*(tensor.chunk(pieces) for tensor in tensors), strict=True):
        weighted, of_logits, nats_of_piece = piece_of(x @ matrix.T, target, weight, cap)
        total += weighted
        of_target.copy_(nats_of_piece)
        torch.mm(of_logits, matrix, out=of_x)
        # The pieces are summed in the type in which the weight is kept.
        if of_matrix.dtype == of_logits.dtype:
            of_matrix.addmm_(of_logits.T, x)
        elif sums_in_float32(hidden.device, hidden.dtype):
            _add_product_in_float32(of_matrix, of_logits.T, x)
        else:
            of_matrix += of_logits.T @ x
    return total, of_hidden, of_head, nats


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


def _chunk(raw: Tensor, targets: Tensor, weights: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sum () of weighted nats, its gradient by the raw logits (n, V), which are used up, and the nats (n,)."""
    raw_of_target = raw.gather(1, targets[:, None])[:, 0]
    ratio = tanh_of(_precise(raw).mul_(1 / cap))
    # Once more for the targets: if they were taken out of the others' ratios, a compiler would write those to memory.
    of_target = tanh_of(_precise(raw_of_target) * (1 / cap))
    exponentials = (ratio * cap).exp_()
    sums = exponentials.sum(dim=-1)
    nats = sums.log() - cap * of_target
    # Of the cross entropy: the probability, and one less at the target. Of the softcap: 1 - ratio².
    at_target = weights * torch.expm1(-nats) * (1 - of_target.square())
    gradient = exponentials.mul_((weights / sums)[:, None]).mul_(ratio.square_().neg_().add_(1))
    total = (weights * nats).sum()
    # Cast last: in bfloat16 a CPU scatters through a float32 copy of the whole.
    return total, gradient.scatter_(1, targets[:, None], at_target[:, None]).to(raw.dtype), nats


@functools.cache
def sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of matrices of ``dtype`` can be added to a float32 matrix as it is made: tried to find out.

    Else it is rounded to ``dtype`` and makes a tensor of its own.
    """
    if device.type != "cuda":
        return False
    total, ones = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device, dtype=dtype)
    try:
        _add_product_in_float32(total, ones.T, ones)
    except (AttributeError, RuntimeError, TypeError):  # an older PyTorch, another maker's GPU
        return False
    return bool((total == 17).all())


def _add_product_in_float32(total: Tensor, one: Tensor, other: Tensor) -> None:
    """total (n, m), float32, += one (n, k) @ other (k, m), both in 16 bits."""
    torch.ops.aten.addmm.dtype_out(total, one, other, torch.float32, out=total)


@functools.lru_cache(maxsize=16)
def compiled_piece(device: torch.device, dtype: torch.dtype, tokens: int) -> Callable[..., tuple[Tensor, ...]]:
    """The work on pieces of these many tokens (the last one may have fewer), compiled.

    Each number has code of its own: a process that trains several models would come to the end of what is kept of one.
    """
    return torch.compile(twin(_chunk), dynamic=False)
