"""What the recipe gives to each role of parameters: the settings' defaults. Source: golden/optimizer_6_steps.json."""

from __future__ import annotations

from dataclasses import dataclass

# Learning rates at the reference batch and width, and the weight decay of the Muon groups.
RECIPE = {
    "matrix_lr": 0.02,
    "embedding_lr": 0.3,
    "unembedding_lr": 0.008,
    "scalar_lr": 0.5,
    "smear_lr": 0.2,
    "weight_decay": 0.28,
}
ADAMW_EPS = 1e-10


@dataclass(frozen=True)
class AdamWRule:
    """What a role gets of AdamW: ``lr = hyperparameter * factor``, times the width scale where ``by_width``."""

    hyperparameter: str
    betas: tuple[float, float]
    weight_decay: float
    factor: float = 1.0
    by_width: bool = False
    eps: float = ADAMW_EPS


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
