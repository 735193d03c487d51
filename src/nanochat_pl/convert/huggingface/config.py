"""``config.json`` of transformers: our architecture as its keys, and back.

An architecture that transformers has itself (October 2025: a plain decoder) is written as its ``NanoChatForCausalLM``;
any other for the modeling file that travels with it (``remote_code``). What transformers has no key for stands whole
under the one key ``nanochat_pl``; the other keys must agree with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build, to_plain
from nanochat_pl.model.config import ROTARY_REACH, GPTConfig

OURS = "nanochat_pl"
NATIVE_TYPE, REMOTE_TYPE = "nanochat", "nanochat_pl"
REMOTE_MODULE = "modeling_nanochat_pl"
REMOTE_CODE = f"{REMOTE_MODULE}.py"

# Fields of GPTConfig under the names that transformers has for them.
_COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "sequence_len",
}
# How a model computes is no part of what it is; nor is what it makes of rows of several documents: here a row is one.
_UNWRITTEN = ("embedding_dtype", "compute_dtype", "document_start_id", "restart_positions")
# What every native model has, and ours all have: a file that says otherwise is of another architecture.
_FIXED = {"hidden_act": "relu2", "attention_bias": False, "tie_word_embeddings": False}


def is_native(config: GPTConfig) -> bool:
    """Whether transformers has this architecture: all layers see the whole row, and nothing of what came later."""
    return (
        config.width == config.num_heads * config.head_dim
        and all(window >= config.sequence_len for window in config.windows)
        and config.qk_scale == 1.0
        and not (config.smear_channels or config.backout or config.residual_lambdas or config.value_embedding_layers)
    )


def to_keys(config: GPTConfig) -> dict[str, Any]:
    """The architecture as keys of ``config.json``."""
    common = {theirs: getattr(config, ours) for theirs, ours in _COMMON.items()}
    if is_native(config):
        return {
            "architectures": ["NanoChatForCausalLM"],
            "model_type": NATIVE_TYPE,
            **common,
            **_FIXED,
            "attention_dropout": 0.0,
            # That of float32, which torch's rms_norm takes where none is given.
            "rms_norm_eps": torch.finfo(torch.float32).eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
            "final_logit_softcapping": config.softcap,
        }
    others = [field.name for field in fields(config) if field.name not in {*_COMMON.values(), *_UNWRITTEN}]
    return {
        "architectures": ["NanoChatPLForCausalLM"],
        "model_type": REMOTE_TYPE,
        "auto_map": {
            "AutoConfig": f"{REMOTE_MODULE}.NanoChatPLConfig",
            "AutoModelForCausalLM": f"{REMOTE_MODULE}.NanoChatPLForCausalLM",
        },
        **common,
        "tie_word_embeddings": False,
        **{name: to_plain(getattr(config, name)) for name in others},
    }


def from_keys(document: Mapping[str, Any], where: str) -> tuple[GPTConfig, StageInfo | None]:
    """The architecture of a ``config.json``, and the origin if nanochat-pl wrote it.

    Raises:
        UserError: a key is missing, wrong, of another architecture, or contradicts what stands under ``nanochat_pl``.
    """
    if OURS in document:
        return _own(document, where)
    if document.get("model_type") != NATIVE_TYPE:
        raise UserError(
            f"{where}: model_type={document.get('model_type')!r}: must be {NATIVE_TYPE!r}, or the file must have the"
            f" key {OURS!r}, which nanochat-pl writes.",
            fix="This reads models of the nanochat family only.",
        )
    return _foreign(document, where), None


def _own(document: Mapping[str, Any], where: str) -> tuple[GPTConfig, StageInfo]:
    part = document[OURS]
    if not isinstance(part, dict) or set(part) != {"config", "stage"}:
        raise UserError(f"{where}: {OURS}: must have the keys config and stage.")
    config = build(GPTConfig, part["config"], f"{where}: {OURS}.config")
    stage = build(StageInfo, part["stage"], f"{where}: {OURS}.stage")
    # transformers writes these anew when it saves a model.
    ours = {key: value for key, value in to_keys(config).items() if key not in ("auto_map", "rope_parameters")}
    problems = [
        f"{where}: {key}={document[key]!r}, but {OURS}.config says {value!r}."
        for key, value in ours.items()
        if key in document and document[key] != value
    ]
    problems += [f"{where}: {key}: is missing." for key in ours if key not in document]
    if is_native(config) and _rope_theta(document) != config.rotary_base:
        problems.append(f"{where}: rope_theta={_rope_theta(document)!r}, but {OURS}.config: {config.rotary_base!r}.")
    if problems:
        raise UserError(problems, fix=f"The two must agree; delete {OURS!r} where the other keys are right.")
    return config, stage


def _foreign(document: Mapping[str, Any], where: str) -> GPTConfig:
    """The architecture from transformers' keys alone. A key that is missing has transformers' default."""
    problems = [
        f"{where}: {key}={document[key]!r}: must be {value!r}; nanochat-pl has nothing else."
        for key, value in _FIXED.items()
        if document.get(key, value) != value
    ]
    rope = document.get("rope_parameters") or document.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        problems.append(f"{where}: rope_parameters={rope!r}: rope_type must be 'default'.")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    problems += [f"{where}: {key}: is missing." for key in sizes if key not in document]
    wrong = [key for key in (*sizes, "head_dim", "num_key_value_heads") if not _is_size(document.get(key, 1))]
    problems += [f"{where}: {key}={document[key]!r}: must be a whole number, 1 or more." for key in wrong]
    if problems:
        raise UserError(problems)
    width, heads, layers = (document[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    length = document.get("max_position_embeddings", 2048)
    values = {
        "vocab_size": document["vocab_size"],
        "padded_vocab_size": document["vocab_size"],
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": document.get("num_key_value_heads") or heads,
        "head_dim": document.get("head_dim") or width // heads,
        "width": width,
        "mlp_width": document["intermediate_size"],
        "sequence_len": length,
        # Bounded here: the list must not grow large before its length is checked.
        "windows": [length] * min(layers, 10_000),
        "rotary_base": _rope_theta(document),
        "rotary_reach": ROTARY_REACH * length if isinstance(length, int) else length,
        "rotary_bfloat16": False,
        "softcap": document.get("final_logit_softcapping", 15.0),
        "qk_scale": 1.0,
        "smear_channels": 0,
        "backout": False,
        "residual_lambdas": False,
        "value_embedding_layers": [],
        "value_gate_channels": 1,
        "value_gate_scale": 1.0,
    }
    return build(GPTConfig, values, where)


def _rope_theta(document: Mapping[str, Any]) -> Any:
    rope = document.get("rope_parameters")
    inside = rope.get("rope_theta") if isinstance(rope, dict) else None
    return inside if inside is not None else document.get("rope_theta", 10_000.0)


def _is_size(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)
