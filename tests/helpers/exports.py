"""Bundles of the three generations with the golden weights, and transformers' side of them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nanochat_pl.bundle.bundle import Bundle, load_bundle, save_bundle
from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.convert.huggingface.write import write_huggingface
from nanochat_pl.model.config import GPTConfig, ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.tokenizer import Tokenizer
from tests.reference.golden_tokenizer import load_golden_tokenizer

GENERATIONS = ("2025_10", "2026_02", "2026")
WEIGHTS = {
    "2025_10": "era_oct2025/model_000003.pt",
    "2026_02": "era_feb2026/model_000003.pt",
    "2026": "nanochat_base/base_checkpoints/d4/model_000007.pt",
}


def config_of(generation: str) -> GPTConfig:
    """The architecture of a golden checkpoint."""
    small = ModelSettings(depth=4, aspect_ratio=16, head_dim=16, num_kv_heads=2, sequence_len=512)
    if generation == "2026":
        return resolve_model(small, 1000, "float32")
    plain = replace(
        small,
        sequence_len=256,
        vocab_multiple=1,
        window_pattern="L",
        rotary_base=10_000.0,
        rotary_bfloat16=True,
        qk_scale=1.0,
        smear_channels=0,
        backout=False,
        residual_lambdas=False,
        value_embeddings=False,
    )
    if generation == "2025_10":
        return resolve_model(plain, 640, "float32")
    middle = replace(plain, window_pattern="SSL", short_window_divisor=2, residual_lambdas=True, value_embeddings=True)
    return resolve_model(replace(middle, value_gate_channels=32, value_gate_scale=2.0), 640, "float32")


def tokenizer_of(golden: Path, vocab_size: int) -> Tokenizer:
    """The golden tokenizer with its first merges only, so that it fits the smaller models."""
    whole = load_golden_tokenizer(golden)
    return Tokenizer(whole.tokens[: vocab_size - len(whole.special_ids)], whole.pattern)


def make_bundle(golden: Path, folder: Path, generation: str, with_tokenizer: bool = True, **changes: Any) -> Bundle:
    """A bundle with golden weights, loaded. ``changes`` of the config leave the weights' shapes alone."""
    config = replace(config_of(generation), **changes)
    net = GPT(config).materialise()
    net.load_state_dict(torch.load(golden / WEIGHTS[generation], weights_only=True))
    stage = StageInfo(stage="base", step=7, metrics={"val/bpb": 1.25}, settings={"model": {"depth": 4}})
    tokenizer = tokenizer_of(golden, config.vocab_size) if with_tokenizer else None
    return load_bundle(save_bundle(folder, stage, net=net, tokenizer=tokenizer), dtype="float32")


def write(bundle: Bundle, folder: Path) -> Path:
    """The folder for transformers, without the comparison in a fresh process."""
    folder.mkdir()
    write_huggingface(bundle, folder)
    return folder


@contextmanager
def transformers_at(folder: Path) -> Iterator[ModuleType]:
    """transformers, with the copies that it makes of code that travels in ``folder`` instead of the person's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra hf)")
        from transformers import dynamic_module_utils

        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.setattr(sys, "path", list(sys.path))
        yield transformers
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]


@functools.cache
def prompts(tokenizer: Tokenizer) -> tuple[list[int], ...]:
    """A short prompt, and one that is longer than the short window of 128."""
    long = "Return the mean of the data, a sequence of numbers; an error is raised where there are none of them. " * 3
    return tuple([tokenizer.bos_id, *tokenizer.encode(text)] for text in ("The capital of France is", long[:330]))
