"""A slow, plain optimizer: one matrix at a time, float64, no stacking, from the recipe alone."""

from __future__ import annotations

import math
from typing import Any

import torch

POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5
# The parts of a Muon step, by the names of our settings.
RECIPE = {
    "orthogonalization": "polar_express",
    "equilibrate_rows": True,
    "frobenius_factor": 1.01,
    "frobenius_eps": 1e-6,
    "renormalize": True,
    "variance_reduction": True,
    "beta2": 0.9,
    "decay": "cautious",
}


def orthogonalize(g: torch.Tensor, parts: dict[str, Any]) -> torch.Tensor:
    """(M, N) → (M, N), nearly orthogonal, where asked with the Frobenius norm sqrt(min(M, N))."""
    rows, columns = g.shape
    x = g
    if parts["equilibrate_rows"]:
        norms = [max(float(row.norm()), 1e-6) for row in g]
        mean = sum(norms) / rows
        x = torch.stack([row * (mean / norm) for row, norm in zip(g, norms, strict=True)])
    x = x / (parts["frobenius_factor"] * x.norm() + parts["frobenius_eps"])
    for a, b, c in {"polar_express": POLAR_EXPRESS, "newton_schulz": NEWTON_SCHULZ}[parts["orthogonalization"]]:
        if rows > columns:
            gram = x.T @ x
            x = a * x + x @ (b * gram + c * gram @ gram)
        else:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
    norm = x.norm()
    return x * (math.sqrt(min(rows, columns)) / norm) if parts["renormalize"] and norm > 1e-6 else x


class Muon:
    """Muon of one matrix (M, N); ``step`` changes it in place."""

    def __init__(self, matrix: torch.Tensor, **parts: Any) -> None:
        rows, columns = matrix.shape
        self.matrix = matrix
        self.parts = {**RECIPE, **parts}
        self.beta2 = self.parts["beta2"]
        self.momentum = torch.zeros_like(matrix)
        self.mean_squares = torch.zeros(rows if rows >= columns else columns, dtype=matrix.dtype)

    def step(self, gradient: torch.Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        rows, columns = self.matrix.shape
        self.momentum = momentum * self.momentum + (1 - momentum) * gradient
        update = orthogonalize((1 - momentum) * gradient + momentum * self.momentum, self.parts)
        if self.parts["variance_reduction"]:
            update = self._reduce_variance(update)
        lr = lr * math.sqrt(max(1.0, rows / columns))
        for i in range(rows):
            for j in range(columns):
                p, u = float(self.matrix[i, j]), float(update[i, j])
                decay = p if self.parts["decay"] == "plain" or u * p >= 0 else 0.0
                self.matrix[i, j] = p - lr * u - lr * weight_decay * decay

    def _reduce_variance(self, update: torch.Tensor) -> torch.Tensor:
        by_row = update.shape[0] >= update.shape[1]
        lines = update if by_row else update.T
        mean_squares = torch.stack([(line**2).mean() for line in lines])
        self.mean_squares = self.beta2 * self.mean_squares + (1 - self.beta2) * mean_squares
        scaled = torch.stack(
            [line / max(float(m), 1e-10) ** 0.5 for line, m in zip(lines, self.mean_squares, strict=True)]
        )
        norm = scaled.norm()
        scaled = scaled * (update.norm() / norm) if norm > 1e-10 else scaled
        return scaled if by_row else scaled.T


class AdamW:
    """AdamW of one tensor; ``step`` changes it in place."""

    def __init__(self, tensor: torch.Tensor, betas: tuple[float, float], weight_decay: float) -> None:
        self.tensor, self.betas, self.weight_decay = tensor, betas, weight_decay
        self.first = torch.zeros_like(tensor)
        self.second = torch.zeros_like(tensor)
        self.steps = 0

    def step(self, gradient: torch.Tensor, lr: float) -> None:
        beta1, beta2 = self.betas
        self.steps += 1
        self.tensor -= lr * self.weight_decay * self.tensor
        self.first = beta1 * self.first + (1 - beta1) * gradient
        self.second = beta2 * self.second + (1 - beta2) * gradient**2
        unbiased_first = self.first / (1 - beta1**self.steps)
        unbiased_second = self.second / (1 - beta2**self.steps)
        self.tensor -= lr * unbiased_first / (unbiased_second.sqrt() + 1e-10)
