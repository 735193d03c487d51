"""What the user sets of the optimizer, and how it becomes numbers.

A learning rate or the weight decay is resolved in this order: given by the user, inherited from the parent stage, the
reference's. The reference's is scaled by the plan (batch, horizon); given and inherited ones are taken as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import setting
from nanochat_pl.optim.rules import ADAMW_RULES, MATRIX, RECIPE, AdamWRule

REFERENCE_WIDTH = 768  # the width at which the recipe's learning rates were found
# The one group that optim.adam_betas leaves alone, as its first beta is long in every version of the recipe.
OWN_BETAS = ("x0_lambda",)
Betas = list[Annotated[float, Field(ge=0, le=1)]]


@dataclass(frozen=True)
class ReferenceRates:
    """Node ``optim.reference``: learning rates and decay at the reference batch, which the plan scales."""

    matrix_lr: float = setting(RECIPE["matrix_lr"], "Muon learning rate of the matrices in the blocks.", at_least=0)
    embedding_lr: float = setting(
        RECIPE["embedding_lr"], "AdamW learning rate of the token embedding at width 768.", at_least=0
    )
    unembedding_lr: float = setting(
        RECIPE["unembedding_lr"], "AdamW learning rate of lm_head at width 768.", at_least=0
    )
    scalar_lr: float = setting(RECIPE["scalar_lr"], "AdamW learning rate of the residual scalars.", at_least=0)
    smear_lr: float = setting(RECIPE["smear_lr"], "AdamW learning rate of smear and backout; never scaled.", at_least=0)
    weight_decay: float = setting(
        RECIPE["weight_decay"], "Weight decay of the matrices, scaled by batch and horizon too.", at_least=0
    )


@dataclass(frozen=True)
class AdamWSettings:
    """One group of AdamW (``optim.adamw.wte`` …). A null is the recipe's for that group."""

    lr_factor: float | None = setting(
        None, "Multiplies the learning rate of its kind (value_embedding: 0.5, resid_lambda: 0.01, else 1).", at_least=0
    )
    betas: Betas | None = setting(None, "The two betas; null: optim.adam_betas.", max_length=2)
    eps: float | None = setting(None, "Added to the root of the second moment; null: optim.adam_eps.", above=0)
    weight_decay: float | None = setting(None, "Decoupled weight decay, constant over the stage.", at_least=0)

    def __post_init__(self) -> None:
        _require_two(self.betas, "betas")


@dataclass(frozen=True)
class AdamWGroups:
    """Node ``optim.adamw``: the groups of AdamW by the role of their parameters."""

    lm_head: AdamWSettings = setting(factory=AdamWSettings, doc="The output layer.")
    wte: AdamWSettings = setting(factory=AdamWSettings, doc="The token embedding.")
    value_embedding: AdamWSettings = setting(factory=AdamWSettings, doc="Value embeddings; rate of the embedding.")
    resid_lambda: AdamWSettings = setting(factory=AdamWSettings, doc="Factors of the residual stream.")
    x0_lambda: AdamWSettings = setting(factory=AdamWSettings, doc="Factors of the first embedding in each block.")
    smear: AdamWSettings = setting(factory=AdamWSettings, doc="Smear and backout.")


@dataclass(frozen=True)
class MuonSettings:
    """Node ``optim.muon``: the parts of a Muon step, in their order; momentum is Nesterov's, from the schedule."""

    orthogonalization: Literal["polar_express", "newton_schulz"] = setting(
        "polar_express", "Five steps of Polar Express, or of the quintic Newton-Schulz iteration of classic Muon."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Type of its matrix products; auto: bfloat16 where the model computes in it, else float32."
    )
    round_terms: bool = setting(
        False, "Round each term of an iteration's sums to that type, and not only the sums: another order of rounding."
    )
    equilibrate_rows: bool = setting(True, "First scale each row to the mean norm of the rows.")
    frobenius_factor: float = setting(
        1.01, "The matrix is divided by so many times its Frobenius norm.", at_least=1, at_most=10
    )
    frobenius_eps: float = setting(1e-6, "Added to that divisor.", above=0, at_most=1)
    renormalize: bool = setting(True, "Then bring the Frobenius norm to that of an orthogonal matrix.")
    variance_reduction: bool = setting(
        True, "Then divide each row (column, of a wide matrix) by the root of its running mean square (NorMuon)."
    )
    beta2: float = setting(0.9, "Of that running mean.", at_least=0, at_most=1)
    decay: Literal["cautious", "plain"] = setting(
        "cautious", "Weight decay: only where it pulls the way of the update, or everywhere."
    )


@dataclass(frozen=True)
class OptimSettings:
    """Config group ``optim``. A null is inherited from the parent stage where there is one, else the recipe's."""

    matrix_lr: float | None = setting(
        None,
        "Muon learning rate of the matrices in the blocks, as it is; null: of optim.reference, scaled.",
        at_least=0,
    )
    embedding_lr: float | None = setting(
        None, "AdamW learning rate of the token embedding at width 768 (value embeddings: half).", at_least=0
    )
    unembedding_lr: float | None = setting(None, "AdamW learning rate of lm_head at width 768.", at_least=0)
    scalar_lr: float | None = setting(
        None, "AdamW learning rate of the residual scalars (x0_lambdas; resid_lambdas: a hundredth).", at_least=0
    )
    smear_lr: float | None = setting(None, "AdamW learning rate of smear and backout; never scaled.", at_least=0)
    weight_decay: float | None = setting(None, "Weight decay of the matrices, before its schedule.", at_least=0)
    reference: ReferenceRates = setting(factory=ReferenceRates, doc="What the plan scales where those are null.")
    scale_by_batch: bool = setting(
        True, "Scale optim.reference by the batch, and its weight decay by the horizon too; false: taken as it is."
    )
    adam_betas: Betas | None = setting(
        None,
        "Betas of all AdamW groups but x0_lambda; null: the recipe's, per group.",
        max_length=2,
    )
    adam_eps: float | None = setting(None, "Of all AdamW groups; null: 1e-10.", above=0, at_most=1)
    adamw: AdamWGroups = setting(factory=AdamWGroups, doc="Single groups of AdamW, by role.")
    muon: MuonSettings = setting(factory=MuonSettings, doc="The parts of a Muon step.")
    max_grad_norm: float | None = setting(
        None, "Gradients of a step with a larger L2 norm are scaled down to it; null: they stay as they are.", above=0
    )
    compile: bool = setting(False, "Compile the Muon update (slow to start, faster steps on a GPU).")

    def __post_init__(self) -> None:
        _require_two(self.adam_betas, "adam_betas")

    @staticmethod
    def explain_unknown(key: str, value: object) -> str | None:
        """Older files have one word for what is made of parts now."""
        return ": is made of parts now: say optim=classic_muon, or optim.muon.…" if key == "matrix_optimizer" else None


def _require_two(betas: list[float] | None, key: str) -> None:
    if betas is not None and (len(betas) != 2 or max(betas) >= 1):
        raise UserError(f"{key}={betas}: must be two numbers from 0 to below 1.")


def adamw_rules(settings: OptimSettings) -> dict[str, AdamWRule]:
    """What each AdamW group gets: its own key, else that of all groups, else the recipe's."""
    rules = {}
    for role, recipe in ADAMW_RULES.items():
        own: AdamWSettings = getattr(settings.adamw, role)
        betas = own.betas or (None if role in OWN_BETAS else settings.adam_betas) or recipe.betas
        eps = own.eps if own.eps is not None else settings.adam_eps
        rules[role] = dataclasses.replace(
            recipe,
            betas=(betas[0], betas[1]),
            eps=recipe.eps if eps is None else eps,
            weight_decay=recipe.weight_decay if own.weight_decay is None else own.weight_decay,
            factor=recipe.factor if own.lr_factor is None else own.lr_factor,
        )
    return rules


@dataclass(frozen=True)
class Hyperparameters:
    """Resolved: every number that the groups are made of, and where it came from.

    ``adamw`` has a rule for each role of AdamW. ``sources`` maps each name of RECIPE to "given", "inherited from
    <stage>" or "recipe".
    """

    matrix_lr: float
    embedding_lr: float
    unembedding_lr: float
    scalar_lr: float
    smear_lr: float
    weight_decay: float
    width: int
    compute_dtype: str = "float32"
    adamw: dict[str, AdamWRule] = field(default_factory=lambda: dict(ADAMW_RULES))
    muon: MuonSettings = field(default_factory=MuonSettings)
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
    """Take every hyperparameter from the settings, else from the parent stage, else from ``settings.reference``.

    Args:
        width: of the model.
        compute_dtype: of the model.
        batch_lr_scale: multiplies the reference's learning rates (all but smear's), from the plan.
        weight_decay_scale: multiplies the reference's weight decay, from the plan.
        parent: the parent stage's :meth:`Hyperparameters.to_inherit`.
        parent_name: how ``sources`` calls the parent.
    """
    values: dict[str, float] = {}
    sources: dict[str, str] = {}
    for name in RECIPE:
        given = getattr(settings, name)
        if given is not None:
            values[name], sources[name] = given, "given"
        elif parent is not None and name in parent:
            values[name], sources[name] = parent[name], f"inherited from {parent_name}"
        else:
            scale = {"smear_lr": 1.0, "weight_decay": weight_decay_scale}.get(name, batch_lr_scale)
            values[name], sources[name] = getattr(settings.reference, name) * scale, "recipe"
    return Hyperparameters(
        **values,
        width=width,
        compute_dtype=compute_dtype,
        adamw=adamw_rules(settings),
        muon=settings.muon,
        compile=settings.compile,
        sources=sources,
    )


# What a resume file must agree on with the configuration, else the difference is told. The rest follows schedules.
FIXED_HYPERPARAMETERS = ("kind", "initial_lr", "initial_weight_decay", "betas", "eps", "beta2", "muon")


def hyperparameter_differences(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each hyperparameter that parameter groups and saved ones have otherwise."""
    saved_by_name = {name: group for group in saved for name in group["param_names"]}
    lines = []
    for group in groups:
        name = group["param_names"][0]
        before = saved_by_name.get(name, {})
        for key in FIXED_HYPERPARAMETERS:
            now, then = group.get(key), before.get(key)
            if key == "muon" and key not in before:
                continue  # written before a step had parts to choose
            if now != (tuple(then) if isinstance(then, list) else then):
                what = key.removeprefix("initial_")
                lines.append(f"{what} of the {group['role']} group ({name} …): {now}; it was {then} in the file.")
    return lines


def learning_rate(role: str, hyper: Hyperparameters) -> float:
    """Learning rate of a role's group, before its schedule."""
    if role == MATRIX:
        return hyper.matrix_lr
    rule = hyper.adamw[role]
    return getattr(hyper, rule.hyperparameter) * rule.factor * (hyper.width_lr_scale if rule.by_width else 1.0)
