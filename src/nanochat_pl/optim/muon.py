"""The arithmetic of one optimizer step, on float32 tensors in place: AdamW and Muon.

Shapes: K matrices of one shape in a stack, M rows, N columns.

Sources: AdamW (arXiv 1711.05101), Muon (kellerjordan.github.io/posts/muon), NorMuon (arXiv 2510.05491),
golden/optimizer_6_steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nanochat_pl.optim.config import MuonSettings
from nanochat_pl.optim.orthogonalize import SMALL, orthogonalize

Scalar = float | Tensor


def adamw_update(
    group: Mapping[str, Any], values: list[Tensor], gradients: list[Tensor], states: list[dict[str, Tensor]]
) -> None:
    """One AdamW step on several parameters, in place.

    Args:
        group: lr, betas, weight_decay, eps.
        values, gradients: float32, of any shape.
        states: of each parameter ``step`` (a scalar, counted up here), ``exp_avg``, ``exp_avg_sq``: float32.
    """
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        values,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        steps,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


def muon_update(
    values: Tensor,
    gradients: Tensor,
    momentum: Tensor,
    second_moment: Tensor,
    lr: Scalar,
    lr_times_decay: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    muon: MuonSettings,
    dtype: torch.dtype,
) -> None:
    """One Muon step on a stack, in place.

    Args:
        values, gradients, momentum: float32 (K, M, N); the gradients are used up.
        second_moment: float32 (K, M, 1) where M >= N, else (K, 1, N).
        lr: with the factor sqrt(max(1, M / N)) in it.
        lr_times_decay: that lr times the weight decay.
        beta1: the momentum.
        beta2: of the second moment.
        muon: the parts of the step.
        dtype: of the matrix products.
    """
    momentum.lerp_(gradients, 1 - beta1)
    nesterov = gradients.lerp_(momentum, beta1)
    x = orthogonalize(nesterov, muon, dtype)
    if muon.renormalize or muon.variance_reduction:
        # Into memory that is there already and contiguous (a tall x is a transposed view).
        update = torch.mul(x, normuon_scale(x, second_moment, beta2, muon) * lr, out=gradients)
    else:
        update = x.float() * lr
    if muon.decay == "plain":
        values.mul_(1 - lr_times_decay).sub_(update)
        return
    # Cautious: only where decay and update pull the same way.
    decay = (update * values).ge_(0.0).mul_(lr_times_decay)
    values.addcmul_(values, decay, value=-1).sub_(update)


def normuon_scale(x: Tensor, second_moment: Tensor, beta2: Scalar, muon: MuonSettings) -> Tensor:
    """Renormalisation and NorMuon as one factor per line; a line is a row where M >= N, else a column.

    Renormalisation brings the Frobenius norm to that of an orthogonal matrix, sqrt(min(M, N)). NorMuon then divides
    each line by the root of its running mean square, and keeps that norm. Both only scale lines, so line norms are
    all that is needed. No bias correction (arXiv 2602.21545, 2510.05491).

    Args:
        x: (K, M, N).
        second_moment: float32 (K, M, 1) or (K, 1, N), updated in place by the variance reduction.
        muon: which of the two are wanted, one at least.

    Returns:
        float32, shaped as ``second_moment``, or (K, 1, 1) for renormalisation alone.
    """
    dim = -1 if second_moment.shape[-1] == 1 else -2
    line_norms = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    renormalize: Tensor | None = None
    if muon.renormalize:
        renormalize = min(x.shape[-2:]) ** 0.5 / _norm_over_lines(line_norms).clamp_min(SMALL)
        if not muon.variance_reduction:
            return renormalize
        line_norms = line_norms * renormalize
    second_moment.lerp_(line_norms.square() / x.shape[dim], 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    keep_norm = _norm_over_lines(line_norms) / _norm_over_lines(line_norms * scale).clamp_min(1e-10)
    return (scale if renormalize is None else renormalize * scale) * keep_norm


def _norm_over_lines(line_norms: Tensor) -> Tensor:
    """Frobenius norms of a stack from its line norms: (K, M, 1) or (K, 1, N) → (K, 1, 1)."""
    return torch.linalg.vector_norm(line_norms, dim=(-2, -1), keepdim=True)
