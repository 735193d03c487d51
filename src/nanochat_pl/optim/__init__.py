"""The optimizer and its schedules. Knows roles of parameters, no model."""

from nanochat_pl.optim.muon_adamw import MuonAdamW, build_optimizer
from nanochat_pl.optim.parameter_groups import (
    ROLES,
    Hyperparameters,
    OptimSettings,
    resolve_hyperparameters,
    width_lr_scale,
)
from nanochat_pl.optim.schedules import ScheduleSettings, StepValues, schedule_values

__all__ = [
    "ROLES",
    "Hyperparameters",
    "MuonAdamW",
    "OptimSettings",
    "ScheduleSettings",
    "StepValues",
    "build_optimizer",
    "resolve_hyperparameters",
    "schedule_values",
    "width_lr_scale",
]
