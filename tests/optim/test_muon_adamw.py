"""The optimizer's step: against the plain reference, against torch's AdamW, and its edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nanochat_pl.common.schema import build
from nanochat_pl.optim.config import MuonSettings, OptimSettings
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.optim.schedules import StepValues
from tests.helpers.small_optim import ROLES, chosen, hyper, make_optimizer, make_parameters, set_gradients
from tests.reference.optimizer import AdamW, Muon

STEPS = [StepValues(0.25, 0.85, 1.0), StepValues(1.0, 0.9, 0.6), StepValues(0.5, 0.97, 0.1)]
MATRICES = [name for name, role in ROLES.items() if role == "matrix"]


def distance(a: torch.Tensor, b: torch.Tensor, start: torch.Tensor) -> float:
    return float(((a - b).norm() / (b - start).norm()).detach())


PARTS = [
    {},
    {"orthogonalization": "newton_schulz"},
    {"round_terms": True},
    {"equilibrate_rows": False, "frobenius_factor": 1.3},
    {"renormalize": False, "beta2": 0.6},
    {"variance_reduction": False},
    {"renormalize": False, "variance_reduction": False, "frobenius_eps": 0.01},
    {"decay": "plain"},
    {"orthogonalization": "newton_schulz", "equilibrate_rows": False, "renormalize": False, "decay": "plain"},
]


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_muon_agrees_with_the_plain_reference_on_tall_wide_square_and_one_row_matrices(parts: dict[str, Any]) -> None:
    """Every part of a step in another way than the recipe's, alone and some of them together."""
    parameters = make_parameters()
    start = {name: parameters[name].detach().double() for name in MATRICES}
    plain = {name: Muon(start[name].clone(), **parts) for name in MATRICES}
    settings = OptimSettings(matrix_lr=0.05, weight_decay=0.3, muon=build(MuonSettings, parts))
    optimizer = make_optimizer(parameters, settings)
    for seed, values in enumerate(STEPS):
        set_gradients(parameters, seed)
        optimizer.set_step_values(values)
        optimizer.step()
        for name in MATRICES:
            lr, decay = 0.05 * values.lr_multiplier, 0.3 * values.weight_decay_multiplier
            plain[name].step(parameters[name].grad.double(), lr, values.muon_momentum, decay)
    for name in MATRICES:
        assert distance(parameters[name].double(), plain[name].matrix, start[name]) < 2e-5, name


def test_adamw_groups_agree_with_the_plain_reference_and_keep_their_weight_decay() -> None:
    expected = {  # lr at width 48, betas, weight decay: recipe, section 4
        "wte.weight": (0.3 * 4, (0.8, 0.995), 0.001),
        "lm_head.weight": (0.008 * 4, (0.8, 0.96), 0.01),
        "value_embeds.1.weight": (0.3 * 0.5 * 4, (0.8, 0.995), 0.01),
        "resid_lambdas": (0.5 * 0.01, (0.8, 0.95), 0.05),
        "x0_lambdas": (0.5, (0.96, 0.95), 0.0),
        "smear_gate.weight": (0.2, (0.8, 0.95), 0.0),
        "smear_lambda": (0.2, (0.8, 0.95), 0.0),
    }
    parameters = make_parameters()
    start = {name: parameters[name].detach().double() for name in expected}
    plain = {name: AdamW(start[name].clone(), betas, decay) for name, (_, betas, decay) in expected.items()}
    optimizer = make_optimizer(parameters)
    for seed, values in enumerate(STEPS):
        set_gradients(parameters, seed)
        optimizer.set_step_values(values)
        optimizer.step()
        for name, (lr, _, _) in expected.items():
            plain[name].step(parameters[name].grad.double(), lr * values.lr_multiplier)
    for name in expected:
        assert distance(parameters[name].double(), plain[name].tensor, start[name]) < 2e-5, (
            name
        )  # float32 rounding of values far larger than their change


def test_bfloat16_parameters_are_updated_in_float32() -> None:
    """bfloat16 moments or decay would lose updates below 1/256 of a value."""
    low, full = make_parameters(dtype=torch.bfloat16), make_parameters(dtype=torch.bfloat16)
    full = {name: nn.Parameter(parameter.detach().float()) for name, parameter in full.items()}
    low_optimizer, full_optimizer = make_optimizer(low), make_optimizer(full)
    set_gradients(low, 1)
    for name in full:
        full[name].grad = low[name].grad.float()
    low_optimizer.step()
    full_optimizer.step()
    for name in low:
        assert low[name].dtype == torch.bfloat16
        torch.testing.assert_close(low[name], full[name].bfloat16(), rtol=0, atol=0)
    assert all(moment.dtype == torch.float32 for moment in low_optimizer.moments_by_name().values())


def test_bfloat16_orthogonalization_stays_near_float32() -> None:
    parameters, rounded = make_parameters(), make_parameters()
    start = make_parameters()
    optimizer, rounded_optimizer = make_optimizer(parameters), make_optimizer(rounded, compute_dtype="bfloat16")
    assert rounded_optimizer.muon_dtype == torch.bfloat16
    for each in (parameters, rounded):
        set_gradients(each, 3)
    optimizer.step()
    rounded_optimizer.step()
    for name in MATRICES:
        assert distance(rounded[name], parameters[name], start[name]) < 0.25, name


def test_a_gradient_of_zeros_moves_nothing_and_makes_no_nan() -> None:
    """A projection that starts at zero gives the layers before it gradients of exactly zero."""
    parameters = make_parameters()
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = make_optimizer(parameters, OptimSettings(weight_decay=0.0))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name in MATRICES:
        assert torch.equal(parameters[name], start[name])
    set_gradients(parameters, 0)
    optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in parameters.values())


def test_a_missing_gradient_is_an_error_before_anything_changes() -> None:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters)
    set_gradients(parameters, 0)
    parameters["h.1.c_q.weight"].grad = None
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with pytest.raises(RuntimeError, match=r"h\.1\.c_q\.weight"):
        optimizer.step()
    assert all(torch.equal(parameters[name], start[name]) for name in start)
    assert all(float(moment.abs().sum()) == 0 for moment in optimizer.moments_by_name().values())


def test_all_state_is_there_before_the_first_step() -> None:
    """State allocated within the first step can run out of memory half-way, with some parameters updated."""
    parameters = make_parameters()
    optimizer = make_optimizer(parameters)
    optimizer.allocate_state()
    addresses = {key: moment.data_ptr() for key, moment in optimizer._moments().items()}
    set_gradients(parameters, 0)
    optimizer.step()
    assert addresses == {key: moment.data_ptr() for key, moment in optimizer._moments().items()}


def test_the_closure_is_called_with_gradients_on_and_its_result_given_back() -> None:
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = build_optimizer([("p", parameter)], {"p": "wte"}, hyper())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 16.0
    assert parameter.max().item() < 1.0


def test_classic_muon_is_selectable_and_has_singular_values_near_one() -> None:
    parameter = nn.Parameter(torch.zeros(16, 32))
    settings = chosen("optim=classic_muon", "optim.matrix_lr=1.0")
    optimizer = build_optimizer([("p", parameter)], {"p": "matrix"}, hyper(settings))
    parameter.grad = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    singular_values = torch.linalg.svdvals(parameter.detach())
    assert float(singular_values.min()) > 0.6 and float(singular_values.max()) < 1.3


@pytest.mark.slow
def test_the_compiled_update_equals_the_eager_one() -> None:
    eager, compiled = ({"p": nn.Parameter(torch.eye(8)), "q": nn.Parameter(torch.ones(8, 8))} for _ in range(2))
    roles = {"p": "matrix", "q": "matrix"}
    eager_optimizer = build_optimizer(eager.items(), roles, hyper())
    compiled_optimizer = build_optimizer(compiled.items(), roles, hyper(OptimSettings(compile=True)))
    for step in range(12):
        values = StepValues((step + 1) / 12, 0.85 + step / 100, 1 - step / 12)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            for parameters, optimizer in ((eager, eager_optimizer), (compiled, compiled_optimizer)):
                set_gradients(parameters, step)
                optimizer.set_step_values(values)
                optimizer.step()
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-3, atol=1e-4)
