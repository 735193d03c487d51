"""The mid stage: between base and sft."""

from __future__ import annotations

from nanochat_pl.training.stages.registry import stage
from nanochat_pl.training.stages.sft import Sft


@stage("mid")
class Mid(Sft):
    """Training on conversations, of which every token is learnt."""

    parents = ("base",)
    loss_mask = "all"
    config_file = "mid"
    next_step = ("fine-tune it", "train stage=sft")
