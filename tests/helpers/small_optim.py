"""A set of parameters with every role and every kind of shape, and an optimizer of them."""

from __future__ import annotations

import torch
from torch import nn

from nanochat_pl.cli.train import compose_train
from nanochat_pl.optim.config import Hyperparameters, OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.muon_adamw import MuonAdamW
from nanochat_pl.optim.param_groups import build_optimizer

SHAPES = {
    "wte.weight": ("wte", (20, 8)),
    "lm_head.weight": ("lm_head", (20, 8)),
    "value_embeds.1.weight": ("value_embedding", (20, 4)),
    "resid_lambdas": ("resid_lambda", (3,)),
    "x0_lambdas": ("x0_lambda", (3,)),
    "smear_gate.weight": ("smear", (1, 6)),
    "smear_lambda": ("smear", (1,)),
    "h.0.c_q.weight": ("matrix", (8, 8)),
    "h.0.c_fc.weight": ("matrix", (24, 8)),
    "h.0.c_proj.weight": ("matrix", (8, 24)),
    "h.0.ve_gate.weight": ("matrix", (1, 6)),
    "h.1.c_q.weight": ("matrix", (8, 8)),
    "h.1.c_fc.weight": ("matrix", (24, 8)),
    "h.1.c_proj.weight": ("matrix", (8, 24)),
}
ROLES = {name: role for name, (role, _) in SHAPES.items()}
WIDTH = 48  # so that the width scale is 4


def chosen(*overrides: str) -> OptimSettings:
    """The settings as a person gets them, by the names of the files."""
    return compose_train(overrides).config.optim


def make_parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, (_, shape) in SHAPES.items()
    }


def make_optimizer(
    parameters: dict[str, nn.Parameter], settings: OptimSettings | None = None, compute_dtype: str = "float32"
) -> MuonAdamW:
    return build_optimizer(parameters.items(), ROLES, hyper(settings, compute_dtype))


def hyper(settings: OptimSettings | None = None, compute_dtype: str = "float32") -> Hyperparameters:
    return resolve_hyperparameters(settings or OptimSettings(), width=WIDTH, compute_dtype=compute_dtype)


def set_gradients(parameters: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
