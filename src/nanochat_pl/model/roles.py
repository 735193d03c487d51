"""What each parameter is for: the optimizer's settings go by it."""

from __future__ import annotations

from torch import nn

_BEGINNINGS = {
    "lm_head.": "lm_head",
    "transformer.wte.": "wte",
    "transformer.h.": "matrix",
    "value_embeds.": "value_embedding",
    "resid_lambdas": "resid_lambda",
    "x0_lambdas": "x0_lambda",
    "smear_": "smear",
    "backout_lambda": "smear",
}
ROLES = tuple(dict.fromkeys(_BEGINNINGS.values()))


def parameter_roles(net: nn.Module) -> dict[str, str]:
    """The role of each parameter by name: what the optimizer's settings are keyed by.

    Roles: ``lm_head``, ``wte``, ``value_embedding``, ``resid_lambda``, ``x0_lambda``, ``smear`` (its gate and factor,
    and the backout factor), ``matrix`` (all matrices in the blocks).
    """
    return {name: _role(name) for name, _ in net.named_parameters()}


def _role(name: str) -> str:
    roles = [role for beginning, role in _BEGINNINGS.items() if name.startswith(beginning)]
    assert len(roles) == 1, f"parameter {name!r} has no role"
    return roles[0]
