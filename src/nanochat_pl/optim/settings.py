"""What the user sets of the optimizer, and how it becomes numbers.

A hyperparameter is resolved in this order: given by the user, inherited from the parent stage, the recipe's. The
recipe's is scaled by the plan (batch, horizon); given and inherited ones are taken as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

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
    max_grad_norm: float | None = setting(
        None, "Gradients of a step with a larger L2 norm are scaled down to it; null: they stay as they are.", above=0
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
    compute_dtype: str = "float32"
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
    compute_dtype: str = "float32",
    batch_lr_scale: float = 1.0,
    weight_decay_scale: float = 1.0,
    parent: Mapping[str, float] | None = None,
    parent_name: str = "base",
) -> Hyperparameters:
    """Take every hyperparameter from the settings, else from the parent stage, else from the recipe.

    Args:
        width: of the model.
        compute_dtype: of the model.
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
        compute_dtype=compute_dtype,
        matrix_optimizer=settings.matrix_optimizer,
        compile=settings.compile,
        sources=sources,
    )
