"""Tiny models with no zero weight, so that no term can hide an error."""

from __future__ import annotations

import dataclasses

import torch

from nanochat_pl.model.config import GPTConfig, ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights


def tiny_config(depth: int = 3, vocab_size: int = 50, num_kv_heads: int = 2, **changes) -> GPTConfig:
    """Width 16 a layer, heads of 8; the short windows, which no tiny row would fill, are 3."""
    settings = ModelSettings(depth=depth, aspect_ratio=16, head_dim=8, num_kv_heads=num_kv_heads, sequence_len=32)
    config = resolve_model(settings, vocab_size, "float32")
    short = tuple(3 if window > config.sequence_len else window for window in config.windows)
    return dataclasses.replace(config, **{"windows": short, **changes})


def perturbed(config: GPTConfig, seed: int = 0) -> GPT:
    """A network on the CPU whose every weight is away from its first value."""
    net = init_weights(GPT(config).materialise(), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return net


def random_ids(config: GPTConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
