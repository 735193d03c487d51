"""AdamW and classic Muon against torch.optim, where both express the same rule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nanochat_pl.optim.muon_adamw import MuonAdamW
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.optim.schedules import StepValues
from tests.helpers.small_optim import ROLES, chosen, hyper, make_optimizer, make_parameters, set_gradients

MATRICES = [name for name, role in ROLES.items() if role == "matrix"]
STEPS = [StepValues(1 / (step + 1), 0.85 + 0.02 * step, 1.0) for step in range(6)]


def set_step(ours: MuonAdamW, theirs: torch.optim.Optimizer, values: StepValues) -> None:
    """What our schedules set, set by hand in torch's optimizer."""
    ours.set_step_values(values)
    for group in theirs.param_groups:
        group["lr"] = group["initial_lr"] * values.lr_multiplier
        if "momentum" in group:
            group["momentum"] = values.muon_momentum


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_groups_are_torchs_adamw(fused: bool) -> None:
    """Bit for bit with the fused kernel; the plain loop of torch rounds in another order."""
    ours, theirs = make_parameters(), make_parameters()
    optimizer = make_optimizer(ours)
    groups = [
        {
            "params": [theirs[name] for name in group["param_names"]],
            "initial_lr": group["initial_lr"],
            "lr": group["initial_lr"],
            "betas": group["betas"],
            "weight_decay": group["weight_decay"],
        }
        for group in optimizer.param_groups
        if group["kind"] == "adamw"
    ]
    assert len(groups) == 6
    reference = torch.optim.AdamW(groups, eps=1e-10, fused=fused)
    for seed, values in enumerate(STEPS):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        set_step(optimizer, reference, values)
        optimizer.step()
        reference.step()
    tolerance = 0.0 if fused else 1e-6
    for name in set(ROLES) - set(MATRICES):
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=name)


def classic_and_torchs(compute_dtype: str, shape: tuple[int, int]) -> float:
    """Six steps of both on two matrices, with gradients of many sizes; how far they are apart, of the way they went."""
    settings = chosen("optim=classic_muon", "optim.matrix_lr=0.02", "optim.weight_decay=0")
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    ours, theirs = ([nn.Parameter(each.clone()) for each in start] for _ in range(2))
    names = ("p", "q")
    optimizer = build_optimizer(
        list(zip(names, ours, strict=True)), dict.fromkeys(names, "matrix"), hyper(settings, compute_dtype)
    )
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, nesterov=True, adjust_lr_fn="original")
    for group in reference.param_groups:
        group["initial_lr"] = group["lr"]
    generator = torch.Generator().manual_seed(0)
    for step, values in enumerate(STEPS):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(shape, generator=generator) * 10.0 ** (step % 3 - 3)
            other.grad = mine.grad.clone()
        set_step(optimizer, reference, values)
        optimizer.step()
        reference.step()
    apart = (torch.stack(ours) - torch.stack(theirs)).detach().norm()
    return float(apart / (torch.stack(theirs) - torch.stack(start)).detach().norm())


SHAPES = pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24), (64, 128), (1, 6)])


@SHAPES
def test_classic_muon_is_torchs_muon(shape: tuple[int, int]) -> None:
    """Torch multiplies matrices in bfloat16: so does ours then, and what is left are single roundings (here 1e-6)."""
    assert classic_and_torchs("bfloat16", shape) < 5e-3


@SHAPES
def test_classic_muon_in_float32_is_the_rule_of_torchs_muon(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's cast to bfloat16 taken out, float32 tells any other rule from rounding."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    assert classic_and_torchs("float32", shape) < 1e-5


def test_the_recipes_muon_is_another_rule() -> None:
    """The comparison above can fail."""
    changed = [make_parameters() for _ in range(2)]
    for parameters, name in zip(changed, ("nanochat", "classic_muon"), strict=True):
        optimizer = make_optimizer(parameters, chosen(f"optim={name}"))
        set_gradients(parameters, 0)
        optimizer.step()
    apart, moved = (changed[0][MATRICES[0]] - changed[1][MATRICES[0]]).norm(), make_parameters()[MATRICES[0]]
    assert apart > 0.05 * (changed[1][MATRICES[0]] - moved).norm()
