"""The optimizer and its schedules. Knows roles of parameters, no model."""

from nanochat_pl.optim.config import Hyperparameters, MuonSettings, OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.muon_adamw import MuonAdamW
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.optim.rules import ROLES
from nanochat_pl.optim.schedules import ScheduleSettings, StepValues, schedule_values

__all__ = [
    "ROLES",
    "Hyperparameters",
    "MuonAdamW",
    "MuonSettings",
    "OptimSettings",
    "ScheduleSettings",
    "StepValues",
    "build_optimizer",
    "resolve_hyperparameters",
    "schedule_values",
]
