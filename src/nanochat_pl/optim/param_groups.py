"""Which hyperparameters each parameter gets: roles in, optimizer groups out. Source: golden/optimizer_6_steps.json.

The model says which role each parameter has; the hyperparameters say what a role gets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.common.schema import to_plain
from nanochat_pl.optim.config import Hyperparameters, learning_rate
from nanochat_pl.optim.muon_adamw import MuonAdamW
from nanochat_pl.optim.rules import ADAMW_RULES, MATRIX, ROLES

MUON_MOMENTUM = 0.95  # until the schedule sets it


def build_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], roles: Mapping[str, str], hyper: Hyperparameters
) -> MuonAdamW:
    """The optimizer of a model.

    Args:
        named_parameters: in model order.
        roles: of every parameter, by name.
        hyper: of :func:`~nanochat_pl.optim.config.resolve_hyperparameters`.

    Raises:
        UserError: see :func:`make_groups`.
    """
    return MuonAdamW(
        make_groups(named_parameters, roles, hyper),
        muon=hyper.muon,
        muon_dtype=muon_dtype(hyper),
        compile_muon=hyper.compile,
    )


def muon_dtype(hyper: Hyperparameters) -> torch.dtype:
    """Type of Muon's matrix products: where nobody says, bfloat16 for a model that computes in it, else float32."""
    name = hyper.compute_dtype if hyper.muon.dtype == "auto" else hyper.muon.dtype
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def make_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], roles: Mapping[str, str], hyper: Hyperparameters
) -> list[dict[str, Any]]:
    """Parameter groups in a fixed order: one per AdamW role, then one Muon group per matrix shape, shapes sorted.

    Parameters keep the order they are given in. A frozen parameter (``requires_grad`` false) is left out.

    Raises:
        UserError: a parameter without a role, an unknown role, a role without its parameter, a matrix that is none.
    """
    parameters = dict(named_parameters)
    _check_roles(parameters, roles)
    trained = [(name, parameter) for name, parameter in parameters.items() if parameter.requires_grad]
    groups: list[dict[str, Any]] = []
    for role, rule in ((role, hyper.adamw[role]) for role in ADAMW_RULES):
        members = [(name, parameter) for name, parameter in trained if roles[name] == role]
        if members:
            adamw = {"betas": rule.betas, "eps": rule.eps, "weight_decay": rule.weight_decay}
            lr = learning_rate(role, hyper)
            groups.append({"kind": "adamw", "role": role, "name": role, "params": members, "lr": lr, **adamw})
    matrices = [(name, parameter) for name, parameter in trained if roles[name] == MATRIX]
    shapes = sorted({tuple(parameter.shape) for _, parameter in matrices})
    for shape in shapes:
        members = [(name, parameter) for name, parameter in matrices if tuple(parameter.shape) == shape]
        muon: dict[str, Any] = {"muon": to_plain(hyper.muon)}
        muon |= {"weight_decay": hyper.weight_decay, "beta2": hyper.muon.beta2, "momentum": MUON_MOMENTUM}
        lr = learning_rate(MATRIX, hyper)
        name = MATRIX if len(shapes) == 1 else f"{MATRIX}_{shape[0]}x{shape[1]}"
        groups.append({"kind": "muon", "role": MATRIX, "name": name, "params": members, "lr": lr, **muon})
    return groups


def _check_roles(parameters: Mapping[str, torch.nn.Parameter], roles: Mapping[str, str]) -> None:
    problems = []
    for name, parameter in parameters.items():
        role = roles.get(name)
        if role is None:
            problems.append(f"parameter {name}: has no role, so no hyperparameters.")
        elif role not in ROLES:
            problems.append(f"parameter {name}: unknown role {role!r}; {did_you_mean(role, ROLES)}")
        elif role == MATRIX and parameter.ndim != 2:
            problems.append(f"parameter {name}: has the role matrix and {parameter.ndim} dimensions, not 2.")
    problems += [f"role of {name}: there is no such parameter." for name in roles if name not in parameters]
    if problems:
        raise UserError(problems, fix=f"Give every parameter one of the roles {', '.join(ROLES)}.")
