"""The three generations of nanochat's architecture: how they are told apart, and the configuration of each.

A checkpoint does not say which code it belongs to. Its tensors do: names and shapes differ. What they cannot tell
(rotary base, factors, short windows) follows from the generation. Dates and versions are not asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import setting
from nanochat_pl.convert.nanochat.layout import Era
from nanochat_pl.convert.nanochat.safe_unpickle import STORED_DTYPES
from nanochat_pl.convert.report import FactRow
from nanochat_pl.model.config import MAX_LAYERS, DType, GPTConfig, ModelSettings, num_heads, resolve_model

_OLDER: dict[str, Any] = {
    "short_window_divisor": 2,
    "short_window_multiple": None,
    "rotary_base": 10_000.0,
    "rotary_bfloat16": True,
    "qk_scale": 1.0,
    "smear_channels": 0,
    "backout": False,
}
# The values of the files of configs/model.
ERAS: dict[Era, dict[str, Any]] = {
    "nanochat": {},
    "nanochat_2026_02": {**_OLDER, "value_gate_channels": 32, "value_gate_scale": 2.0},
    "nanochat_2025_10": {**_OLDER, "residual_lambdas": False, "value_embeddings": False},
}
VOCAB_MULTIPLE = 64
# What checkpoints of older runs may lack, and what it then is: as if it were not there.
FILLED_IN = {"resid_lambdas": 1.0, "x0_lambdas": 0.0}
WTE = "transformer.wte.weight"
_NEWEST = ("smear_gate.weight", "smear_lambda", "backout_lambda")


@dataclass(frozen=True)
class ReferenceConfig:
    """``model_config`` of a meta file."""

    sequence_len: int = setting(at_least=1, at_most=2**22)
    vocab_size: int = setting(at_least=1, at_most=2**21)
    n_layer: int = setting(at_least=1, at_most=MAX_LAYERS)
    n_head: int = setting(at_least=1, at_most=2**10)
    n_kv_head: int = setting(at_least=1, at_most=2**10)
    n_embd: int = setting(at_least=1, at_most=2**16)
    window_pattern: str | None = setting(None, max_length=MAX_LAYERS)

    def __post_init__(self) -> None:
        problems = []
        if self.n_embd % self.n_head:
            problems.append(f"n_embd={self.n_embd}: is no multiple of n_head={self.n_head}.")
        if self.n_head % self.n_kv_head:
            problems.append(f"n_kv_head={self.n_kv_head}: does not divide n_head={self.n_head}.")
        if self.window_pattern is not None and (
            not self.window_pattern or set(self.window_pattern.upper()) - set("SL")
        ):
            problems.append(f"window_pattern={self.window_pattern!r}: must be letters S and L.")
        if problems:
            raise UserError(problems)


def find_era(there: ReferenceConfig, weights: Mapping[str, torch.Tensor]) -> tuple[Era, str]:
    """The generation that a checkpoint's tensors belong to, and what shows it."""
    for name in _NEWEST:
        if name in weights:
            return "nanochat", f"by {name}"
    for name, tensor in weights.items():
        if name.endswith(".ve_gate.weight"):
            channels = tensor.shape[-1] if tensor.ndim else 0
            return ("nanochat_2026_02" if channels == 32 else "nanochat"), f"by {channels} channels of {name}"
    for name in weights:
        if name in FILLED_IN or name.startswith("value_embeds."):
            return "nanochat_2026_02", f"by {name}"
    if there.window_pattern is not None:
        return "nanochat_2026_02", "by window_pattern in the meta file"
    return "nanochat_2025_10", "by what it lacks: value embeddings, residual factors, windows"


def model_settings(there: ReferenceConfig, era: Era, value_embeddings: bool) -> ModelSettings:
    """The settings that give a model of this generation and size.

    A width that the dial cannot give is only near: ask the architecture, not the settings.
    """
    own = ERAS[era]
    settings = ModelSettings(
        **{
            **own,
            "depth": there.n_layer,
            "aspect_ratio": max(1, there.n_embd // there.n_layer),
            "head_dim": there.n_embd // there.n_head,
            "sequence_len": there.sequence_len,
            "window_pattern": (there.window_pattern or "L").upper(),
            "value_embeddings": own.get("value_embeddings", True) and value_embeddings,
        }
    )
    on_the_dial = num_heads(settings) == there.n_head
    return dataclasses.replace(settings, num_kv_heads=there.n_kv_head) if on_the_dial else settings


def resolve(there: ReferenceConfig, era: Era, padded_vocab_size: int, value_embeddings: bool = True) -> GPTConfig:
    """The architecture of a checkpoint, in float32."""
    config = resolve_model(model_settings(there, era, value_embeddings), there.vocab_size, "float32")
    return dataclasses.replace(
        config,
        padded_vocab_size=padded_vocab_size,
        # A width that the dial cannot give is what it is.
        num_heads=there.n_head,
        num_kv_heads=there.n_kv_head,
        width=there.n_embd,
        mlp_width=4 * there.n_embd,
    )


def config_of(there: ReferenceConfig, era: Era, weights: Mapping[str, torch.Tensor]) -> GPTConfig:
    """The architecture of a checkpoint; the types follow from those of its embeddings."""
    rows, padded = len(weights[WTE]), -(-there.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    # The February generation had no value embeddings at first.
    has_values = era != "nanochat_2026_02" or any(name.startswith("value_embeds.") for name in weights)
    config = resolve(there, era, rows if rows == there.vocab_size else padded, has_values)
    kept = {tensor.dtype for name, tensor in weights.items() if name == WTE or name.startswith("value_embeds.")}
    dtype = STORED_DTYPES[kept.pop()] if len(kept) == 1 else "float32"
    # The reference keeps its embeddings in the type that it computes in.
    computed: DType = "bfloat16" if dtype == "bfloat16" else "float32"
    return dataclasses.replace(config, embedding_dtype=dtype, compute_dtype=computed)


def facts(config: GPTConfig, there: ReferenceConfig, era: Era, meta: str) -> tuple[FactRow, ...]:
    """Every field of the architecture with where it comes from."""
    read = {
        "vocab_size": "vocab_size",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "num_kv_heads": "n_kv_head",
        "width": "n_embd",
        "sequence_len": "sequence_len",
    }
    pattern = f"window_pattern={there.window_pattern}" if there.window_pattern else "no window_pattern, so L"
    sources = {
        **{ours: f"{meta}: {theirs}" for ours, theirs in read.items()},
        "head_dim": f"{meta}: n_embd / n_head",
        "padded_vocab_size": f"rows of {WTE}",
        "mlp_width": "shape of mlp.c_fc",
        "windows": f"{meta}: {pattern}; short windows by era",
        "smear_channels": "shape of smear_gate" if config.smear_channels else "no smear_gate",
        "backout": "backout_lambda is there" if config.backout else "no backout_lambda",
        "residual_lambdas": "by era, with its tensors" if config.residual_lambdas else "no resid_lambdas, x0_lambdas",
        "value_embedding_layers": "value_embeds" if config.value_embedding_layers else "no value_embeds",
        "embedding_dtype": "type of the embeddings",
        "compute_dtype": "follows from the type of the embeddings",
    }
    if config.value_embedding_layers:
        sources["value_gate_channels"] = "shape of ve_gate"
    return tuple(
        FactRow(field.name, getattr(config, field.name), sources.get(field.name, f"by era ({era})"))
        for field in dataclasses.fields(config)
    )
