"""Tiny models with no zero weight, so that no term can hide an error; and those of the golden values."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

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


def golden_net(golden: Path, path: str = "nanochat_base/base_checkpoints/d4/model_000007.pt") -> GPT:
    """A network of golden/nanochat_base: 4 layers, a short window of 128, vocabulary of 1,000."""
    settings = ModelSettings(depth=4, aspect_ratio=16, head_dim=16, num_kv_heads=2, sequence_len=512)
    return load_net(golden, resolve_model(settings, 1000, "float32"), path)


def load_net(golden: Path, config: GPTConfig, path: str) -> GPT:
    net = GPT(config).materialise()
    net.load_state_dict(torch.load(golden / path, weights_only=True), strict=True)
    return net


def era_model_config(golden: Path, folder: str) -> dict[str, Any]:
    """What an older version of the reference wrote about its model."""
    return json.loads((golden / folder / "meta_000003.json").read_text(encoding="utf-8"))["model_config"]


def size_overrides(meta: dict[str, Any]) -> list[str]:
    """The sizes in it as overrides of ours."""
    sizes = {
        "depth": meta["n_layer"],
        "aspect_ratio": meta["n_embd"] // meta["n_layer"],
        "head_dim": meta["n_embd"] // meta["n_head"],
        "num_kv_heads": meta["n_kv_head"],
        "sequence_len": meta["sequence_len"],
    }
    return [f"model.{key}={value}" for key, value in sizes.items()]
