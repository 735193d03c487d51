"""Orthogonalization of matrices: Polar Express as the recipe uses it, and the classic Newton-Schulz iteration.

Both approximate the nearest (semi-)orthogonal matrix UVᵀ of X = USVᵀ by odd quintic polynomials of X, so matrix
products are all that is needed. Shapes: K matrices of one shape in a stack, M rows, N columns.

Sources: Muon (kellerjordan.github.io/posts/muon), Polar Express (arXiv 2505.16932), MuonEq (arXiv 2603.28254),
Muon+ (arXiv 2602.21545).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat_pl.optim.config import MuonSettings

Coefficients = Sequence[tuple[float, float, float]]

# One polynomial per step: the first ones lift small singular values, the last one settles near 1.
POLAR_EXPRESS: Coefficients = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
NEWTON_SCHULZ: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5
ITERATIONS = {"polar_express": POLAR_EXPRESS, "newton_schulz": NEWTON_SCHULZ}
SMALL = 1e-6  # keeps a matrix of zeros a matrix of zeros


def odd_quintics(x: Tensor, coefficients: Coefficients, round_terms: bool = False) -> Tensor:
    """Apply ``x ← a x + (b A + c A²) x`` with ``A = x xᵀ`` once per (a, b, c): (K, M, N) → (K, M, N).

    A tall stack is worked on transposed, so A is always the smaller of the two Gram matrices. ``round_terms``: each
    term of the sums is rounded to the type of ``x``, as if they were written out; else a sum is rounded once.
    """
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for a, b, c in coefficients:
        gram = x @ x.mT
        if round_terms:
            x = a * x + (b * gram + c * (gram @ gram)) @ x
            continue
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def orthogonalize(matrices: Tensor, muon: MuonSettings, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring the norm below 1, where asked with all rows alike before it, then take five steps of an iteration.

    Args:
        matrices: float32 (K, M, N).
        muon: which iteration, on what.
        dtype: of the matrix products. Norms are taken in float32 where rows are equilibrated, else in ``dtype`` too,
            as ``torch.optim.Muon`` does.

    Returns:
        (K, M, N) in ``dtype``; singular values near 1 (Polar Express), or 0.7 to 1.2 (Newton-Schulz). What is asked for
        of the Frobenius norm is set afterwards, by :func:`~nanochat_pl.optim.muon.normuon_scale`.
    """
    if muon.equilibrate_rows:
        row_norms = matrices.norm(dim=-1, keepdim=True)
        to_mean = row_norms.clamp_min(SMALL)
        to_mean = to_mean.mean(dim=-2, keepdim=True) / to_mean
        frobenius = torch.linalg.vector_norm(row_norms * to_mean, dim=-2, keepdim=True)
        x = (matrices * (to_mean / (muon.frobenius_factor * frobenius + muon.frobenius_eps))).to(dtype)
    else:
        x = matrices.to(dtype)
        x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) * muon.frobenius_factor + muon.frobenius_eps)
    return odd_quintics(x, ITERATIONS[muon.orthogonalization], muon.round_terms)
