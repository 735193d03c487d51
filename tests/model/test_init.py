"""First weights: the recipe's numbers, none forgotten, the same everywhere."""

from __future__ import annotations

import pytest
import torch

from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.roles import parameter_roles
from tests.helpers.models import random_ids, tiny_config


@pytest.fixture(scope="module")
def net():
    config = resolve_model(ModelSettings(depth=5, aspect_ratio=64, head_dim=64, sequence_len=64), 1000, "float32")
    return init_weights(GPT(config).materialise(), seed=3)


def test_a_network_is_born_without_memory():
    config = resolve_model(ModelSettings(depth=100), 32_768, "float32")
    net = GPT(config)
    assert all(tensor.is_meta for tensor in [*net.parameters(), *net.buffers()])


def test_numbers_of_the_recipe(net):
    bound = (3 / 320) ** 0.5
    for name, weight in net.state_dict().items():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if kind in ("wte", "lm_head"):
            std = {"wte": 0.8, "lm_head": 0.001}[kind]
            assert weight.std() == pytest.approx(std, rel=0.02) and abs(weight.mean()) < 0.01 * std, name
        elif kind in ("c_q", "c_k", "c_v", "c_fc") or "value_embeds" in name:
            largest = 0.4 * bound if kind == "c_fc" else bound
            assert 0.99 * largest < weight.abs().max() <= largest, name
            assert weight.std() == pytest.approx(largest / 3**0.5, rel=0.02), name
        elif kind == "c_proj":
            assert not weight.any(), name
        elif kind in ("ve_gate", "smear_gate"):
            assert weight.min() >= 0 and weight.max() <= 0.02 and weight.max() > 0.01, name
    torch.testing.assert_close(net.resid_lambdas.data, torch.tensor([1.15, 1.125, 1.10, 1.075, 1.05]))
    torch.testing.assert_close(net.x0_lambdas.data, torch.tensor([0.20, 0.1625, 0.125, 0.0875, 0.05]))
    assert net.smear_lambda.item() == 0.0 and net.backout_lambda.item() == pytest.approx(0.2)


def test_the_seed_decides_and_nothing_else():
    config = tiny_config()
    torch.manual_seed(1)
    first = init_weights(GPT(config).materialise(), seed=7)
    torch.manual_seed(2)
    torch.set_default_dtype(torch.float64)
    try:
        torch.rand(10)
        second = init_weights(GPT(config).materialise(), seed=7)
    finally:
        torch.set_default_dtype(torch.float32)
    state = torch.get_rng_state()
    other = init_weights(GPT(config).materialise(), seed=8)
    assert torch.equal(torch.get_rng_state(), state), "the process's generator is left alone"
    for name, weight in first.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, second.state_dict()[name]), name
    assert not torch.equal(first.transformer["wte"].weight, other.transformer["wte"].weight)
    q, k = first.blocks[0].attn.c_q.weight, first.blocks[0].attn.c_k.weight
    assert not torch.equal(q[: len(k)], k), "each parameter has numbers of its own"


def test_a_first_loss_is_that_of_guessing(net):
    ids = random_ids(net.config, 2, 32)
    losses = net.losses(ids, random_ids(net.config, 2, 32, seed=1))
    assert losses.mean().item() == pytest.approx(torch.log(torch.tensor(1000.0)).item(), abs=0.01)


def test_each_parameter_has_a_role(net):
    roles = parameter_roles(net)
    assert list(roles) == [name for name, _ in net.named_parameters()]
    assert roles["transformer.h.0.attn.ve_gate.weight"] == "matrix"
    assert roles["smear_gate.weight"] == roles["smear_lambda"] == roles["backout_lambda"] == "smear"
    assert set(roles.values()) == {
        "wte", "lm_head", "value_embedding", "resid_lambda", "x0_lambda", "smear", "matrix",
    }  # fmt: skip
