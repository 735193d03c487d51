"""The layers without positions: RMSNorm, linear maps, embeddings and the feed-forward part."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_pl.model.config import SMALL_PRODUCT, GPTConfig
from nanochat_pl.model.fp8 import Fp8Backend, fp8_linear


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without parameters."""
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Module):
    """A linear map without bias whose weight (outputs, inputs) is cast to the type of what it is applied to.

    Attributes:
        fp8: multiply in FP8 where gradients are computed, and how; evaluation and sampling compute none.
    """

    fp8: Fp8Backend | None = None

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs))

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 is not None and torch.is_grad_enabled():
            return fp8_linear(x, self.weight, self.fp8)
        return linear(x, self.weight.to(x.dtype))


def without_gradient(parameter: Tensor) -> Tensor:
    """The same value; the parameter's gradient is zero, and not missing, so that an optimizer leaves it as it is."""
    return parameter.detach() + 0 * parameter


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (…, inputs) times the transpose of weight (outputs, inputs). In bfloat16 on a CPU a row's result has the same
    bits beside any number of other rows: small products, which go another way, are made larger."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        rows = x.numel() // x.size(-1)
        if rows * weight.numel() <= SMALL_PRODUCT:
            padding = SMALL_PRODUCT // weight.numel() + 1 - rows
            padded = F.pad(x.reshape(rows, -1), (0, 0, 0, padding))
            return F.linear(padded, weight)[:rows].view(*x.shape[:-1], -1)
    return F.linear(x, weight)


class Embedding(nn.Module):
    """Rows of a table (V, C), gathered in the type in which they are kept."""

    def __init__(self, num_rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class MLP(nn.Module):
    """The feed-forward part, with squared relu."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.width, config.mlp_width)
        self.c_proj = Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())
