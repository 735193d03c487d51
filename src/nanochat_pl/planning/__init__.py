"""From depth to a plan: every derived value with its reason."""

from nanochat_pl.planning.batch_size import RowOptions
from nanochat_pl.planning.horizon import HorizonSettings, check_horizon, estimate_cpu_seconds
from nanochat_pl.planning.plan import Derived, Inherited, Plan, PlanRow, plan_rows, plan_sections, width_remark
from nanochat_pl.planning.scaling import hyperparameters, make_finetune_plan, make_plan

__all__ = [
    "Derived",
    "HorizonSettings",
    "Inherited",
    "Plan",
    "PlanRow",
    "RowOptions",
    "check_horizon",
    "estimate_cpu_seconds",
    "hyperparameters",
    "make_finetune_plan",
    "make_plan",
    "plan_rows",
    "plan_sections",
    "width_remark",
]
