"""What a later stage inherits from an imported checkpoint: learning rates and the batch, where the files tell them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nanochat_pl.model.config import GPTConfig
from nanochat_pl.optim.config import width_lr_scale
from nanochat_pl.optim.rules import RECIPE
from nanochat_pl.planning import Plan
from nanochat_pl.planning.horizon import MAX_BATCH_TOKENS
from nanochat_pl.planning.scaling import REFERENCE_BATCH_TOKENS

# Which group's learning rate is which hyperparameter, and whether the width is in it.
_ROLES = {
    "unembedding_lr": ("lm_head", True),
    "embedding_lr": ("wte", True),
    "scalar_lr": ("x0_lambda", False),
    "smear_lr": ("smear", False),
    "matrix_lr": ("matrix", False),
}


def plan_of_checkpoint(
    config: GPTConfig, meta: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]] | None
) -> Plan:
    """The values that later stages ask for, each with its source.

    Args:
        groups: settings of the optimizer's groups by role, where its file was read.
    """
    plan = Plan()
    batch, asked = meta.get("total_batch_size"), meta.get("user_config")
    if type(batch) is int and 0 < batch <= MAX_BATCH_TOKENS:  # true is no batch
        plan.derive("total_batch_tokens", batch, "total_batch_size of the meta file")
    else:
        plan.derive("total_batch_tokens", REFERENCE_BATCH_TOKENS, "the recipe's: the meta file has none")
    by_batch = math.sqrt(plan["total_batch_tokens"] / REFERENCE_BATCH_TOKENS)
    for name, recipe in RECIPE.items():
        role, by_width = _ROLES.get(name, ("", False))
        found = _rate((groups or {}).get(role, {}).get("initial_lr"))
        given = _rate(asked.get(name)) if isinstance(asked, dict) else None
        scale = by_batch if name in _ROLES and name != "smear_lr" else 1.0
        if found is not None:
            value = found / (width_lr_scale(config.width) if by_width else 1.0)
            plan.derive(name, value, f"initial_lr of the {role} group in the optimizer file")
        elif given is not None:
            plan.derive(name, given * scale, "user_config of the meta file, scaled to the batch")
        else:
            plan.derive(name, recipe * scale, "the recipe's, scaled to the batch: the checkpoint does not tell")
    return plan


def _rate(value: Any) -> float | None:
    """A number that a learning rate may be, or None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value < 1e3 else None
