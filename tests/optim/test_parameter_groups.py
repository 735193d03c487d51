"""Roles to hyperparameters, and where each hyperparameter comes from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build
from nanochat_pl.optim.config import Hyperparameters, OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.param_groups import build_optimizer
from tests.helpers.small_optim import ROLES, chosen, hyper, make_optimizer, make_parameters


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
        build(OptimSettings, {"matrix_lr": -1, "muon": {"orthogonalization": "moun"}, "lr": 1}, "optim")
    assert len(error.value.problems) == 3


def test_roles_of_the_small_model_are_all_the_roles() -> None:
    assert len(set(ROLES.values())) == 7


def adamw_of(settings: OptimSettings) -> dict[str, list[float]]:
    """Betas, eps and weight decay of each AdamW group."""
    groups = make_optimizer(make_parameters(), settings).param_groups
    return {g["role"]: [*g["betas"], g["eps"], g["weight_decay"]] for g in groups if g["kind"] == "adamw"}


def test_betas_eps_and_decay_of_a_group_are_its_own_keys_then_those_of_all_then_the_recipes() -> None:
    recipe = adamw_of(OptimSettings())
    assert recipe["wte"] == [0.8, 0.995, 1e-10, 0.001] and recipe["resid_lambda"] == [0.8, 0.95, 1e-10, 0.05]
    found = adamw_of(
        chosen(
            "optim.adam_betas=[0.7,0.9]",
            "optim.adam_eps=1e-8",
            "optim.adamw.wte.betas=[0.6,0.99]",
            "optim.adamw.lm_head={eps: 0.001, weight_decay: 0}",
            "optim.adamw.x0_lambda.weight_decay=0.2",
        )
    )
    assert found == {
        "lm_head": [0.7, 0.9, 0.001, 0.0],
        "wte": [0.6, 0.99, 1e-8, 0.001],
        "value_embedding": [0.7, 0.9, 1e-8, 0.01],
        "resid_lambda": [0.7, 0.9, 1e-8, 0.05],
        "x0_lambda": [0.96, 0.95, 1e-8, 0.2],  # whose betas are not those of all
        "smear": [0.7, 0.9, 1e-8, 0.0],
    }


def test_the_rate_of_a_group_has_a_factor_and_the_reference_is_what_the_plan_scales() -> None:
    settings = chosen("optim.adamw.value_embedding.lr_factor=1", "optim.reference.embedding_lr=0.2")
    rates = {group["role"]: group["lr"] for group in make_optimizer(make_parameters(), settings).param_groups}
    assert rates["value_embedding"] == rates["wte"] == pytest.approx(0.2 * 4)  # by the width
    scaled = resolve_hyperparameters(settings, width=768, batch_lr_scale=0.5, weight_decay_scale=3.0)
    assert (scaled.embedding_lr, scaled.matrix_lr) == (0.1, 0.01)


def test_the_current_recipe_is_the_default_and_its_files_say_so() -> None:
    def resolved(*overrides: str) -> Hyperparameters:
        return resolve_hyperparameters(chosen(*overrides), width=768)

    assert resolved() == resolved("optim=nanochat") == resolve_hyperparameters(OptimSettings(), width=768)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.adam_betas=[0.9]", "optim.adam_betas=[0.9]: must be two numbers from 0 to below 1."),
        ("optim.adamw.wte.betas=[0.9,1]", "optim.adamw.wte.betas=[0.9, 1.0]: must be two numbers from 0 to below 1."),
        ("optim.muon.frobenius_factor=0.5", "optim.muon.frobenius_factor=0.5: is below 1."),
        ("optim.muon.decay=bold", "optim.muon.decay='bold': must be one of cautious, plain."),
        ("optim.matrix_optimizer=muon", "optim.matrix_optimizer: is made of parts now: say optim=classic_muon"),
        ("optim.adamw.matrix.eps=1", "optim.adamw.matrix: there is no such key"),
    ],
)
def test_wrong_parts_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        chosen(override)
    assert len(error.value.problems) == 1 and error.value.problems[0].startswith(message)
