"""Which hyperparameters each parameter gets: settings and roles in, optimizer groups out. Source: golden/
optimizer_6_steps.json.

The model says which role each parameter has; this file knows what the recipe gives to a role. A learning rate is
resolved in this order: given by the user, inherited from the parent stage, the recipe's (times the batch scale of
the plan). Given and inherited ones are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.common.settings import setting

REFERENCE_WIDTH = 768  # the width at which the recipe's learning rates were found

# Learning rates at the reference batch and width, and the weight decay of the Muon groups.
RECIPE = {
    "matrix_lr": 0.02,
    "embedding_lr": 0.3,
    "unembedding_lr": 0.008,
    "scalar_lr": 0.5,
    "smear_lr": 0.2,
    "weight_decay": 0.28,
}
MUON_BETA2 = 0.9
ADAMW_EPS = 1e-10


@dataclass(frozen=True)
class AdamWRule:
    """What a role gets of AdamW: ``lr = hyperparameter * factor``, times the width scale where ``by_width``."""

    hyperparameter: str
    betas: tuple[float, float]
    weight_decay: float
    factor: float = 1.0
    by_width: bool = False


# In the order of the groups.
ADAMW_RULES = {
    "lm_head": AdamWRule("unembedding_lr", (0.8, 0.96), 0.01, by_width=True),
    "wte": AdamWRule("embedding_lr", (0.8, 0.995), 0.001, by_width=True),
    "value_embedding": AdamWRule("embedding_lr", (0.8, 0.995), 0.01, factor=0.5, by_width=True),
    "resid_lambda": AdamWRule("scalar_lr", (0.8, 0.95), 0.05, factor=0.01),
    "x0_lambda": AdamWRule("scalar_lr", (0.96, 0.95), 0.0),
    "smear": AdamWRule("smear_lr", (0.8, 0.95), 0.0),
}
MATRIX = "matrix"
ROLES = (*ADAMW_RULES, MATRIX)


@dataclass(frozen=True)
class OptimSettings:
    """Config group ``optim``. A null is inherited from the parent stage where there is one, else the recipe's."""

    matrix_lr: float | None = setting(None, "Muon learning rate of the matrices in the blocks.", at_least=0)
    embedding_lr: float | None = setting(
        None, "AdamW learning rate of the token embedding at width 768 (value embeddings: half).", at_least=0
    )
    unembedding_lr: float | None = setting(None, "AdamW learning rate of lm_head at width 768.", at_least=0)
    scalar_lr: float | None = setting(
        None, "AdamW learning rate of the residual scalars (x0_lambdas; resid_lambdas: a hundredth).", at_least=0
    )
    smear_lr: float | None = setting(None, "AdamW learning rate of smear and backout; never scaled.", at_least=0)
    weight_decay: float | None = setting(None, "Weight decay of the matrices, before its schedule.", at_least=0)
    matrix_optimizer: Literal["muon", "classic_muon"] = setting(
        "muon", "muon (the recipe's: Polar Express, NorMuon) or classic_muon (Newton-Schulz alone)."
    )
    compile: bool = setting(False, "Compile the Muon update (slow to start, faster steps on a GPU).")


@dataclass(frozen=True)
class Hyperparameters:
    """Resolved: every number that the groups are made of, and where it came from.

    ``sources`` maps each name of :data:`RECIPE` to "given", "inherited from <stage>" or "recipe".
    """

    matrix_lr: float
    embedding_lr: float
    unembedding_lr: float
    scalar_lr: float
    smear_lr: float
    weight_decay: float
    width: int
    matrix_optimizer: str = "muon"
    compile: bool = False
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def width_lr_scale(self) -> float:
        """Scale of the learning rates of embeddings and lm_head: (width / 768) ** -0.5."""
        return width_lr_scale(self.width)

    def to_inherit(self) -> dict[str, float]:
        """What a later stage may inherit (``parent`` of :func:`resolve_hyperparameters`), as plain data."""
        return {name: getattr(self, name) for name in RECIPE}


def width_lr_scale(width: int) -> float:
    """(width / 768) ** -0.5."""
    return (width / REFERENCE_WIDTH) ** -0.5


def resolve_hyperparameters(
    settings: OptimSettings,
    *,
    width: int,
    batch_lr_scale: float = 1.0,
    weight_decay_scale: float = 1.0,
    parent: Mapping[str, float] | None = None,
    parent_name: str = "base",
) -> Hyperparameters:
    """Take every hyperparameter from the settings, else from the parent stage, else from the recipe.

    Args:
        width: of the model.
        batch_lr_scale: multiplies the recipe's learning rates (all but smear's), from the plan.
        weight_decay_scale: multiplies the recipe's weight decay, from the plan.
        parent: the parent stage's :meth:`Hyperparameters.to_inherit`.
        parent_name: how ``sources`` calls the parent.
    """
    values: dict[str, float] = {}
    sources: dict[str, str] = {}
    for name, recipe_value in RECIPE.items():
        given = getattr(settings, name)
        if given is not None:
            values[name], sources[name] = given, "given"
        elif parent is not None and name in parent:
            values[name], sources[name] = parent[name], f"inherited from {parent_name}"
        else:
            scale = {"smear_lr": 1.0, "weight_decay": weight_decay_scale}.get(name, batch_lr_scale)
            values[name], sources[name] = recipe_value * scale, "recipe"
    return Hyperparameters(
        **values,
        width=width,
        matrix_optimizer=settings.matrix_optimizer,
        compile=settings.compile,
        sources=sources,
    )


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
    for role, rule in ADAMW_RULES.items():
        members = [(name, parameter) for name, parameter in trained if roles[name] == role]
        if members:
            scale = rule.factor * (hyper.width_lr_scale if rule.by_width else 1.0)
            lr = getattr(hyper, rule.hyperparameter) * scale
            adamw = {"betas": rule.betas, "eps": ADAMW_EPS, "weight_decay": rule.weight_decay}
            groups.append({"kind": "adamw", "role": role, "params": members, "lr": lr, **adamw})
    matrices = [(name, parameter) for name, parameter in trained if roles[name] == MATRIX]
    for shape in sorted({tuple(parameter.shape) for _, parameter in matrices}):
        members = [(name, parameter) for name, parameter in matrices if tuple(parameter.shape) == shape]
        muon = {"weight_decay": hyper.weight_decay, "beta2": MUON_BETA2, "momentum": 0.0}
        groups.append({"kind": "muon", "role": MATRIX, "params": members, "lr": hyper.matrix_lr, **muon})
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
