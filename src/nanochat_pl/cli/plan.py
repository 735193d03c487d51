"""Shows the settings that follow from the depth, each with its reason, without training. Takes the keys of train.

nanochat-pl plan model.depth=12
nanochat-pl plan model.depth=12 explain=total_batch_tokens
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_pl.cli.compose import Composed
from nanochat_pl.cli.experiment import compose_step
from nanochat_pl.common.console import print_table, say
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.hardware import choose_compute_dtype, choose_device, device_name
from nanochat_pl.common.settings import setting
from nanochat_pl.planning import Plan, RowOptions, estimate_cpu_seconds, make_plan, plan_rows
from nanochat_pl.planning.devices import detected_device
from nanochat_pl.planning.horizon import MAX_CPU_SECONDS
from nanochat_pl.planning.make import MIN_STEPS_PER_EPOCH
from nanochat_pl.training.settings import TrainConfig


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """The root of configs/plan.yaml: the keys of train, and what to explain."""

    explain: str | None = setting(None, "One value of the plan, with its formula, its inputs and what overrode it.")


Config = PlanConfig
HOURS_PER_YEAR = 24 * 365.25
HELP_KEYS = ("model.depth", "model.sequence_len", "tokenizer.vocab_size", "trainer.accelerator")


def run(arguments: Sequence[str]) -> int:
    """The verb."""
    composed: Composed[PlanConfig] = compose_step("plan", "base", PlanConfig, arguments)
    if composed.config.stage.name != "base":
        raise UserError(
            f"stage={composed.config.stage.name}: only base is planned from its settings alone.",
            "The plan of a later stage follows from its parent; it is in the stage's plan.json when that has begun.",
        )
    if composed.config.explain is not None:
        say(plan_of(composed.config).explain(composed.config.explain))
    else:
        print_plan(composed.config)
    return 0


def plan_of(config: TrainConfig) -> Plan:
    """The plan of pretraining with these settings on this machine, with the vocabulary that the settings name."""
    device = choose_device(config.trainer.accelerator)
    return make_plan(
        config.model,
        config,
        config.optim,
        vocab_size=config.tokenizer.vocab_size,
        compute_dtype=choose_compute_dtype(config.model.compute_dtype, device),
        options=RowOptions(
            device=detected_device(device),
            device_batch_size=config.device_batch_size,
            validation_rows=config.evaluation.num_rows,
            evaluate_every_steps=config.evaluation.every_steps,
        ),
    )


def print_plan(config: TrainConfig) -> None:
    """Print the plan as a table: value, formula, and what overrode it."""
    device, plan, seconds = choose_device(config.trainer.accelerator), plan_of(config), 0.0
    print_table(("value", "", "how it follows", "set by"), plan_rows(plan), title=f"Plan for {device_name(device)}")
    if device.type == "cpu":
        seconds = estimate_cpu_seconds(plan["total_flops"], os.cpu_count() or 1)
        say(f"About {_time(seconds)} on this CPU.")
    say(_what_train_adds(config, plan, seconds))
    say("One value with its inputs: nanochat-pl plan … explain=NAME")


def _what_train_adds(config: TrainConfig, plan: Plan, cpu_seconds: float) -> str:
    """What only train can say, as it looks at the data."""
    remarks = ["The data is not looked at here"]
    if config.total_batch_tokens is None:
        remarks.append(
            "train makes the batch smaller where the text at hand is small"
            f" (at least {MIN_STEPS_PER_EPOCH} steps an epoch)"
        )
    if cpu_seconds > MAX_CPU_SECONDS and not plan.horizon_given:
        remarks.append(f"it would ask for max_steps, as this takes longer than {MAX_CPU_SECONDS / 3600:g} h")
    return f"{'; '.join(remarks)}."


def _time(seconds: float) -> str:
    hours = seconds / 3600
    if hours > 10_000:
        return f"{hours / HOURS_PER_YEAR:,.1f} years"
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.0f} minutes"
