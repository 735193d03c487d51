"""What is saved and handed on: resume state and moments by name."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat_pl.common.errors import UserError
from nanochat_pl.optim.config import OptimSettings
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.optim.schedules import StepValues
from tests.helpers.small_optim import ROLES, chosen, hyper, make_optimizer, make_parameters, set_gradients


def train(parameters, optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        set_gradients(parameters, step)
        optimizer.set_step_values(StepValues(1 / (step + 1), 0.85 + step / 100, 1 - step / 10))
        optimizer.step()


def test_a_resumed_run_is_bit_equal_through_a_file_without_pickle(tmp_path: Path) -> None:
    whole = make_parameters()
    train(whole, make_optimizer(whole), 0, 5)

    halves = make_parameters()
    optimizer = make_optimizer(halves)
    train(halves, optimizer, 0, 3)
    torch.save({"optimizer": optimizer.state_dict(), "net": halves}, tmp_path / "resume.ckpt")

    resumed = make_parameters(seed=9)
    file = torch.load(tmp_path / "resume.ckpt", weights_only=True)
    with torch.no_grad():
        for name, parameter in resumed.items():
            parameter.copy_(file["net"][name])
    resumed_optimizer = make_optimizer(resumed)
    assert resumed_optimizer.load_state_dict(file["optimizer"]) == []
    train(resumed, resumed_optimizer, 3, 5)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_loading_keeps_the_configured_hyperparameters_and_tells_the_differences(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A resumed run with a changed learning rate in its config silently kept the file's."""
    parameters = make_parameters()
    saved = make_optimizer(parameters).state_dict()
    changed = make_optimizer(parameters, OptimSettings(matrix_lr=0.05))
    with caplog.at_level(logging.WARNING):
        differences = changed.load_state_dict(saved)
    muon_groups = [group for group in changed.param_groups if group["kind"] == "muon"]
    assert all(group["initial_lr"] == 0.05 for group in muon_groups)
    assert len(differences) == len(muon_groups) and "0.05" in differences[0] and "0.02" in differences[0]
    assert caplog.messages == differences


def test_other_parts_of_muon_are_told_and_a_state_from_before_there_were_parts_says_nothing_of_them() -> None:
    parameters = make_parameters()
    saved = make_optimizer(parameters, chosen("optim=nanochat_2026_02")).state_dict()
    now = make_optimizer(parameters)
    differences = now.load_state_dict(saved)
    assert any(line.startswith("muon of the matrix group") and "equilibrate_rows" in line for line in differences)
    older = now.state_dict()
    for group in older["groups"]:
        group.pop("muon", None)
    assert now.load_state_dict(older) == []


def test_the_state_does_not_depend_on_the_order_of_the_parameters() -> None:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters)
    train(parameters, optimizer, 0, 2)
    backwards = {name: parameters[name] for name in reversed(parameters)}
    other = build_optimizer(backwards.items(), ROLES, hyper())
    assert other.load_state_dict(copy.deepcopy(optimizer.state_dict())) == []
    for key, moment in optimizer.moments_by_name().items():
        assert torch.equal(moment, other.moments_by_name()[key]), key


def test_moments_go_through_safetensors_and_warm_start_another_optimizer(tmp_path: Path) -> None:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters)
    train(parameters, optimizer, 0, 3)
    moments = optimizer.moments_by_name()
    assert moments["h.0.c_fc.weight.momentum"].shape == (24, 8)
    assert moments["h.0.c_fc.weight.second_moment"].shape == (24, 1)
    assert moments["h.0.c_proj.weight.second_moment"].shape == (1, 24)
    assert moments["wte.weight.step"] == 3
    save_file(moments, tmp_path / "optimizer.safetensors")
    copied = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    warm = make_optimizer(copied)
    warm.load_moments(load_file(tmp_path / "optimizer.safetensors"))
    train(parameters, optimizer, 3, 5)
    train(copied, warm, 3, 5)
    assert all(torch.equal(copied[name], parameters[name]) for name in copied)


def test_moments_are_copies() -> None:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters)
    moments = optimizer.moments_by_name()
    train(parameters, optimizer, 0, 1)
    assert all(float(moment.abs().sum()) == 0 for moment in moments.values())


def test_moments_of_another_model_are_refused_and_nothing_changes() -> None:
    optimizer = make_optimizer(make_parameters())
    moments = {key: moment + 1 for key, moment in optimizer.moments_by_name().items()}
    del moments["wte.weight.exp_avg"]
    moments["h.7.c_q.weight.momentum"] = torch.zeros(8, 8)
    moments["lm_head.weight.exp_avg"] = torch.zeros(21, 8)
    with pytest.raises(UserError) as error:
        optimizer.load_moments(moments)
    text = "\n".join(error.value.problems)
    assert "wte.weight.exp_avg is missing" in text
    assert "h.7.c_q.weight.momentum is unknown" in text
    assert "lm_head.weight.exp_avg has the shape (21, 8), not (20, 8)" in text
    assert all(float(moment.abs().sum()) == 0 for moment in optimizer.moments_by_name().values())


@pytest.mark.parametrize("broken", [{}, {"state": [], "groups": []}, {"state": {"wte.weight": 3}, "groups": {}}])
def test_a_state_of_another_layout_is_refused(broken: dict) -> None:
    with pytest.raises(UserError, match="optimizer state"):
        make_optimizer(make_parameters()).load_state_dict(broken)
