"""Rotary positions: pairs of channels, turned by an angle that grows with the position."""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat_pl.model.config import GPTConfig


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split: channels d and d + D/2 are a pair. x (B, T, H, D), cos and sin (…, T, 1, D/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def rotate_whole(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """:func:`rotate`, with the same bits, in fewer operations: cos and sin (…, T, 1, D) are of :func:`whole_tables`."""
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


def whole_tables(cos: Tensor, sin: Tensor) -> Tensor:
    """The cosines and the signed sines of both halves of the channels: (rotary_reach, 2, D), of two (…, D/2)."""
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([sin, -sin], dim=-1)], dim=1)


def rotary_tables(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 (rotary_reach, D/2): made on the CPU and in float32, as checkpoints were trained."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / (config.rotary_base**exponents)
    angles = torch.outer(torch.arange(config.rotary_reach, dtype=torch.float32, device="cpu"), frequencies)
    cos, sin = angles.cos(), angles.sin()
    if config.rotary_bfloat16:
        cos, sin = cos.bfloat16().float(), sin.bfloat16().float()
    return cos, sin
