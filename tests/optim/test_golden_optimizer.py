"""Six steps and a seventh from imported moments, against the reference (golden/optimizer_*)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from nanochat_pl.convert.nanochat.moments import read_moments
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.muon_adamw import MuonAdamW
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.optim.schedules import StepValues
from tests.helpers.models import golden_net


def golden_optimizer(net: GPT, golden: Path) -> tuple[MuonAdamW, dict]:
    facts = json.loads((golden / "optimizer_6_steps.json").read_text(encoding="utf-8"))
    hyper = resolve_hyperparameters(OptimSettings(**facts["base_lrs"]), width=64)
    return build_optimizer(net.named_parameters(), parameter_roles(net), hyper), facts


def backward(net: GPT, ids: Tensor) -> float:
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = -1
    net.zero_grad()
    loss = net.weighted_loss(ids, targets) / int((targets >= 0).sum())
    loss.backward()
    return loss.item()


def test_groups_have_the_golden_learning_rates_betas_and_shapes(golden: Path) -> None:
    net = golden_net(golden)
    optimizer, facts = golden_optimizer(net, golden)
    assert len(optimizer.param_groups) == len(facts["groups"])
    for group, want in zip(optimizer.param_groups, facts["groups"], strict=True):
        assert group["kind"] == want["kind"]
        assert group["initial_lr"] == pytest.approx(want["initial_lr"], rel=1e-12)
        assert len(group["params"]) == want["n_params"]
        assert {str(tuple(p.shape)) for p in group["params"]} == set(want["shapes"])
        if group["kind"] == "adamw":
            assert [list(group["betas"]), group["eps"], group["weight_decay"]] == [
                want["betas"],
                want["eps"],
                want["weight_decay"],
            ]


def test_six_steps(golden: Path) -> None:
    net = golden_net(golden)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer, facts = golden_optimizer(net, golden)
    tensors = load_file(golden / "optimizer_6_steps.safetensors")
    full_decay = facts["base_lrs"]["weight_decay"]
    for number, step in enumerate(facts["steps"]):
        assert backward(net, tensors[f"batch.{number}"]) == pytest.approx(step["loss_before"], abs=5e-6), number
        decay = step["muon_weight_decay"] / full_decay
        optimizer.set_step_values(StepValues(step["lr_multiplier"], step["muon_momentum"], decay))
        optimizer.step()
        if number in (0, 5):
            prefix = "param_after_1." if number == 0 else "param."
            for name, parameter in net.named_parameters():
                want = tensors[prefix + name]
                error = (parameter.detach() - want).norm() / (want - start[name]).norm()
                assert error <= 5e-3, (number, name)


def test_a_seventh_step_from_the_reference_moments(golden: Path) -> None:
    folder = golden / "nanochat_trained/base_checkpoints/d4"
    net = golden_net(golden, "nanochat_trained/base_checkpoints/d4/model_000013.pt")
    optimizer, _ = golden_optimizer(net, golden)
    optimizer.load_moments(read_moments(folder / "optim_000013_rank0.pt", net)[0])
    facts = json.loads((golden / "optimizer_7th_step.json").read_text(encoding="utf-8"))
    batch = load_file(golden / "optimizer_7th_step.safetensors")["batch"]
    assert backward(net, batch) == pytest.approx(facts["loss_before"], abs=5e-6)
    decay = facts["muon_weight_decay"] / 0.31
    optimizer.set_step_values(StepValues(facts["lr_multiplier"], facts["muon_momentum"], decay))
    optimizer.step()
    assert backward(net, batch) == pytest.approx(facts["loss_after_on_the_same_batch"], abs=5e-6)
