"""Logits, losses, gradients and counts against the golden values."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from nanochat_pl.model.accounting import count_parameters, flops_per_token
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.kv_cache import KVCache


def load_net(golden, config, path="nanochat_base/base_checkpoints/d4/model_000007.pt") -> GPT:
    net = GPT(config).materialise()
    net.load_state_dict(torch.load(golden / path, weights_only=True), strict=True)
    return net


def base_config(**changes):
    settings = ModelSettings(depth=4, aspect_ratio=16, head_dim=16, num_kv_heads=2, sequence_len=512)
    return dataclasses.replace(resolve_model(settings, 1000, "float32"), **changes)


def test_forward_and_gradients(golden):
    expected = load_file(golden / "forward.safetensors")
    net = load_net(golden, base_config())
    ids, targets = expected["idx"], expected["targets"]
    torch.testing.assert_close(net(ids)[:, expected["logit_positions"]], expected["logits"], atol=1e-5, rtol=0)
    losses = net.losses(ids, targets)
    torch.testing.assert_close(losses.flatten(), expected["loss_none"], atol=1e-5, rtol=0)
    loss = net.weighted_loss(ids, targets) / (targets >= 0).sum()
    torch.testing.assert_close(loss, expected["loss"], atol=1e-6, rtol=0)
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad.norm(), expected[f"grad_norm.{name}"], rtol=1e-5, atol=0)
        head = expected[f"grad_head.{name}"]
        assert (parameter.grad.flatten()[:64] - head).norm() <= 1e-5 * head.norm(), name


@pytest.mark.parametrize("rounded, tolerance", [(True, 1e-5), (False, 3e-3)])
@pytest.mark.parametrize("era", ["feb2026", "oct2025"])
def test_older_architectures_are_configs_of_the_same_network(golden, era, rounded, tolerance):
    config = dataclasses.replace(
        base_config(),
        vocab_size=640,
        padded_vocab_size=640,
        sequence_len=256,
        rotary_base=10_000.0,
        rotary_bfloat16=rounded,
        smear_channels=0,
        backout=False,
        qk_scale=1.0,
        windows=(128, 128, 256, 256),
        value_gate_channels=32,
        value_gate_scale=2.0,
    )
    if era == "oct2025":
        config = dataclasses.replace(config, value_embedding_layers=(), residual_lambdas=False, windows=(256,) * 4)
    net = load_net(golden, config, f"era_{era}/model_000003.pt")
    expected = load_file(golden / f"era_{era}" / "forward.safetensors")
    logits = net(expected["idx"])
    torch.testing.assert_close(logits[:, ::8], expected["logits"], atol=tolerance, rtol=0)
    loss = net.weighted_loss(expected["idx"], expected["targets"]) / (expected["targets"] >= 0).sum()
    torch.testing.assert_close(loss, expected["loss"], atol=tolerance, rtol=0)


def test_counts_of_the_plan(golden):
    plan = json.loads((golden / "plan.json").read_text(encoding="utf-8"))
    names = ("sequence_len", "aspect_ratio", "head_dim", "window_pattern")
    fixed = {name: plan["settings"][name] for name in names}
    for row in plan["plans"]:
        config = resolve_model(ModelSettings(depth=row["depth"], **fixed), plan["settings"]["vocab_size"], "bfloat16")
        assert (config.width, config.num_heads) == (row["n_embd"], row["n_head"])
        assert count_parameters(config) == row["params"]
        assert flops_per_token(config) == row["flops_per_token"]
        assert list(config.windows) == row["window_sizes"]


def test_greedy_continuations_with_a_cache(golden):
    """The closest two logits are 2e-5 apart, so this is a test of the cache to the last digits."""
    cases = json.loads((golden / "generation.json").read_text(encoding="utf-8"))
    net = load_net(golden, base_config())
    for case in cases:
        expected = case["greedy_ids"]
        cache, ids, found = KVCache(net.config, 1, 512), case["prompt_ids"], []
        with torch.no_grad():
            while len(found) < len(expected):
                found.append(int(net(torch.tensor([ids]), cache, last_only=True).argmax()))
                ids = found[-1:]
        assert found == expected
