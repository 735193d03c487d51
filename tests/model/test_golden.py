"""Logits, losses, gradients and counts against the golden values."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from nanochat_pl.cli.train import compose_train
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.counts import count_parameters, flops_per_token
from nanochat_pl.model.kv_cache import KVCache
from tests.helpers.models import era_model_config, golden_net, load_net, size_overrides


def test_forward_and_gradients(golden):
    expected = load_file(golden / "forward.safetensors")
    net = golden_net(golden)
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
@pytest.mark.parametrize(
    "folder, overrides",
    [
        ("era_feb2026", ["model=nanochat_2026_02", "model.window_pattern=SSL"]),
        ("era_oct2025", ["model=nanochat_2025_10"]),
    ],
)
def test_older_architectures_are_configs_of_the_same_network(golden, folder, overrides, rounded, tolerance):
    meta = era_model_config(golden, folder)
    settings = compose_train(
        [*overrides, *size_overrides(meta), *([] if rounded else ["model.rotary_bfloat16=false"])]
    ).config.model
    net = load_net(golden, resolve_model(settings, meta["vocab_size"], "float32"), f"{folder}/model_000003.pt")
    expected = load_file(golden / folder / "forward.safetensors")
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
    net = golden_net(golden)
    for case in cases:
        expected = case["greedy_ids"]
        cache, ids, found = KVCache(net.config, 1, 512), case["prompt_ids"], []
        with torch.no_grad():
            while len(found) < len(expected):
                found.append(int(net(torch.tensor([ids]), cache, last_only=True).argmax()))
                ids = found[-1:]
        assert found == expected
