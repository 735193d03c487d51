"""Roles to hyperparameters, and where each hyperparameter comes from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.settings import build
from nanochat_pl.optim import OptimSettings, build_optimizer, resolve_hyperparameters
from tests.optim.small import ROLES, hyper, make_optimizer, make_parameters


def test_every_parameter_is_in_one_group_and_matrices_are_grouped_by_shape() -> None:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(parameters)
    muon = [group for group in optimizer.param_groups if group["kind"] == "muon"]
    assert [tuple(group["params"][0].shape) for group in muon] == [(1, 6), (8, 8), (8, 24), (24, 8)]
    assert muon[1]["param_names"] == ["h.0.c_q.weight", "h.1.c_q.weight"]


def test_a_parameter_without_a_role_or_with_an_unknown_one_is_an_error_and_all_are_told() -> None:
    parameters = {
        "a": nn.Parameter(torch.zeros(2)),
        "b": nn.Parameter(torch.zeros(2)),
        "c": nn.Parameter(torch.ones(2)),
    }
    with pytest.raises(UserError) as error:
        build_optimizer(parameters.items(), {"b": "lm_haed", "c": "matrix", "d": "wte"}, hyper())
    first, second, third, fourth = error.value.problems
    assert "a" in first and "no role" in first
    assert "lm_haed" in second and "lm_head" in second
    assert "1 dimensions" in third
    assert "d" in fourth and "no such parameter" in fourth


def test_a_frozen_parameter_is_left_out() -> None:
    parameters = make_parameters()
    parameters["wte.weight"].requires_grad_(False)
    optimizer = make_optimizer(parameters)
    assert "wte.weight" not in {name for group in optimizer.param_groups for name in group["param_names"]}


def test_given_wins_over_inherited_wins_over_the_recipe() -> None:
    parent = {"matrix_lr": 0.011, "embedding_lr": 0.1}
    resolved = resolve_hyperparameters(OptimSettings(matrix_lr=0.012), width=768, batch_lr_scale=0.5, parent=parent)
    assert (resolved.matrix_lr, resolved.sources["matrix_lr"]) == (0.012, "given")
    assert (resolved.embedding_lr, resolved.sources["embedding_lr"]) == (0.1, "inherited from base")
    assert (resolved.unembedding_lr, resolved.sources["unembedding_lr"]) == (0.004, "recipe")


def test_the_batch_scale_multiplies_every_rate_but_the_smear_groups() -> None:
    resolved = resolve_hyperparameters(OptimSettings(), width=768, batch_lr_scale=0.5, weight_decay_scale=3.0)
    assert resolved.to_inherit() == {
        "matrix_lr": 0.01,
        "embedding_lr": 0.15,
        "unembedding_lr": 0.004,
        "scalar_lr": 0.25,
        "smear_lr": 0.2,
        "weight_decay": pytest.approx(0.84),
    }


def test_a_given_zero_is_a_value() -> None:
    resolved = resolve_hyperparameters(OptimSettings(weight_decay=0.0), width=768, parent={"weight_decay": 0.3})
    assert (resolved.weight_decay, resolved.sources["weight_decay"]) == (0.0, "given")


def test_settings_refuse_negative_rates_and_unknown_optimizers() -> None:
    with pytest.raises(UserError) as error:
        build(OptimSettings, {"matrix_lr": -1, "matrix_optimizer": "moun", "lr": 1}, "optim")
    assert len(error.value.problems) == 3


def test_roles_of_the_small_model_are_all_the_roles() -> None:
    assert len(set(ROLES.values())) == 7
