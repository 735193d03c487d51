"""Shows what follows from the depth, each value with its reason, and what it costs, without training.

nanochat-pl plan model.depth=12
nanochat-pl plan model.depth=20 data=climbmix hardware=h100 num_devices=8 price_per_hour=2.5
nanochat-pl plan model.depth=12 explain=total_batch_tokens
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_pl.cli.compose import Composed
from nanochat_pl.cli.experiment import compose_step
from nanochat_pl.cli.locate import cache_folder
from nanochat_pl.cli.overrides import split_override
from nanochat_pl.common.console import next_steps, print_table, say
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.hardware import ComputeDType, choose_compute_dtype, choose_device
from nanochat_pl.common.settings import setting
from nanochat_pl.data.at_hand import tokens_at_hand, tokens_by_source
from nanochat_pl.data.hub_files import BYTES_PER_TOKEN
from nanochat_pl.model.config import resolve_model
from nanochat_pl.planning import Plan, check_horizon, make_plan, plan_sections, width_remark
from nanochat_pl.planning.devices import Device, detected_device, named_device
from nanochat_pl.planning.horizon import MAX_EPOCHS
from nanochat_pl.planning.make import MIN_STEPS_PER_EPOCH
from nanochat_pl.planning.outlook import TextFacts, add_memory, add_text, add_time, device_remarks
from nanochat_pl.training.settings import TrainConfig, row_options

# Training shards of the recipe's two corpora; each shard holds some 250 million characters.
TRAINING_SHARDS = {"climbmix": 6_542, "fineweb_edu": 1_821}
SHARD_BYTES = 250e6


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """The root of configs/plan.yaml: the keys of train, a device to plan for, and what to explain."""

    hardware: str | None = setting(None, "A GPU to plan for, e.g. h100, a100-80gb, rtx-4090; null: this machine's.")
    num_devices: int = setting(1, "So many of them, data parallel.", at_least=1, at_most=2**16)
    mfu: float | None = setting(
        None, "Share of the GPU's peak that the training reaches; null: assumed.", above=0, at_most=1
    )
    price_per_hour: float | None = setting(
        None, "Price of one device for an hour, in any currency; null: no cost.", at_least=0, at_most=1e9
    )
    explain: str | None = setting(None, "One value of the plan, with its formula, its inputs and what overrode it.")


Config = PlanConfig
HELP_KEYS = ("model.depth", "model.sequence_len", "tokenizer.vocab_size", "trainer.accelerator")
OWN_KEYS = ("hardware", "num_devices", "mfu", "price_per_hour", "explain")


def run(arguments: Sequence[str]) -> int:
    """The verb."""
    composed: Composed[PlanConfig] = compose_step("plan", "base", PlanConfig, arguments)
    config = composed.config
    if config.stage.name != "base":
        raise UserError(
            f"stage={config.stage.name}: only base is planned from its settings alone.",
            "The plan of a later stage follows from its parent; it is in the stage's plan.json when that has begun.",
        )
    plan, device, remarks = full_plan(config)
    if config.explain is not None:
        say(plan.explain(config.explain))
        return 0
    show_plan(plan, device, remarks)
    say()
    next_steps(
        [
            ("one value with its inputs", f"nanochat-pl plan {_typed(composed)}explain=total_batch_tokens"),
            (_label(config), f"nanochat-pl train {_typed(composed)}".rstrip()),
        ]
    )
    return 0


def _label(config: PlanConfig) -> str:
    """What the command to train does: it knows nothing of the hardware that was planned for."""
    return "train it" if config.hardware is None and config.num_devices == 1 else "train it on this machine"


def print_plan(config: TrainConfig) -> None:
    """Print the plan of these settings on this machine, for a check."""
    show_plan(*full_plan(config))


def show_plan(plan: Plan, device: Device, remarks: Sequence[str]) -> None:
    """Print a plan as a table for each section, and the remarks."""
    say(f"Plan for {device.name}", style="bold")
    for title, rows in plan_sections(plan).items():
        say()
        print_table(("value", "", "how it follows", "set by"), rows, title=title)
    say()
    for remark in remarks:
        say(f"- {remark}")


def full_plan(config: TrainConfig) -> tuple[Plan, Device, list[str]]:
    """The plan of pretraining with memory, time, cost and text, the device that it is for, and the remarks on it."""
    ours = config if isinstance(config, PlanConfig) else PlanConfig(**vars(config))
    device, compute_dtype = _device(ours)
    options = row_options(ours, device, ours.num_devices)
    vocab_size = ours.tokenizer.vocab_size
    plan = make_plan(
        ours.model,
        ours,
        ours.optim,
        vocab_size=vocab_size,
        compute_dtype=compute_dtype,
        options=options,
        schedule=ours.schedule,
    )
    model = resolve_model(ours.model, vocab_size, compute_dtype)
    memory = add_memory(plan, model, options)
    add_time(plan, model, options, os.cpu_count() or 1, ours.mfu, ours.price_per_hour)
    add_text(plan, _text_facts(ours))
    remarks = [*filter(None, [width_remark(plan)]), *device_remarks(plan, memory, device)]
    remarks += [*_remarks_on_settings(ours, plan, device), *_epochs_by_source(ours, plan)]
    return plan, device, [*remarks, *_what_train_adds(ours, plan, device)]


def _device(config: PlanConfig) -> tuple[Device, ComputeDType]:
    """The device to plan for, and the type that the training computes in on it."""
    wanted = config.model.compute_dtype
    if config.hardware is None or config.hardware.lower() == "cpu":
        here = choose_device("cpu" if config.hardware else config.trainer.accelerator)
        return detected_device(here), choose_compute_dtype(wanted, here)
    device = named_device(config.hardware)
    if wanted == "auto":
        return device, "bfloat16" if device.bfloat16 else "float32"
    return device, wanted


def _text_facts(config: PlanConfig) -> TextFacts:
    data = config.data
    shards = TRAINING_SHARDS.get(data.name)
    return TextFacts(
        name=f"data={data.name}",
        bytes_per_token=BYTES_PER_TOKEN,
        shard_bytes=None if shards is None else SHARD_BYTES,
        num_shards=shards,
        tokens_at_hand=tokens_at_hand(data, cache_folder(config.paths)),
        crops=data.packing_mode == "crop",
    )


def _remarks_on_settings(config: PlanConfig, plan: Plan, device: Device) -> list[str]:
    remarks = []
    step_flops = plan["flops_per_token"] * plan["total_batch_tokens"]
    if config.max_steps is None and config.flops_budget is not None and config.flops_budget < step_flops:
        remarks.append(
            f"flops_budget={config.flops_budget:g}: is less than one step takes, {step_flops:.3g}; one step is made."
        )
    if device.type == "cpu" and config.mfu is not None:
        remarks.append("mfu has no say for a CPU, whose peak is not known: its time is that of an assumed core.")
    if config.num_devices > 1:
        remarks.append(
            f"Memory is that of one of {config.num_devices} devices, with all of the optimizer's state, of which each"
            " has a share; the time is theirs together, whatever they lose in talking to each other being part of mfu."
        )
    if config.num_devices > plan["rows_per_step"]:
        remarks.append(
            f"num_devices={config.num_devices}: a step has {plan['rows_per_step']:,} rows, so the other devices would"
            " have none and the time is not to be had: take fewer, or a larger total_batch_tokens."
        )
    return remarks


def _epochs_by_source(config: PlanConfig, plan: Plan) -> list[str]:
    """Of a mixture what each source gives, and how often it is read for that."""
    known = tokens_by_source(config.data, cache_folder(config.paths))
    total = sum(part.weight for part in config.data.parts.values())
    remarks = []
    for name, part in config.data.parts.items():
        taken, tokens = plan["total_tokens"] * part.weight / total, known[name]
        remark = f"{name}: {part.weight / total:.3g} of the tokens, {taken:,.0f}; "
        if tokens is None:
            remark += "how many there are is not known yet."
        else:
            remark += f"about {taken / max(tokens, 1):,.2f} epochs of {tokens:,}"
            remark += f", more than {MAX_EPOCHS:g}." if taken > MAX_EPOCHS * tokens else "."
        remarks.append(remark)
    return remarks


def _what_train_adds(config: TrainConfig, plan: Plan, device: Device) -> list[str]:
    """What train does otherwise when it has looked at the data, and what it would ask first."""
    remarks = []
    if config.total_batch_tokens is None:
        remarks.append(
            "train makes the batch smaller where the text at hand is small"
            f" (at least {MIN_STEPS_PER_EPOCH} steps an epoch)."
        )
    try:
        check_horizon(plan, plan["tokens_at_hand"], plan["training_seconds"] if device.type == "cpu" else None)
    except UserError as error:
        remarks += [f"train would ask first: {' '.join(error.problems)} {error.fix}"]
    return remarks


def _typed(composed: Composed[PlanConfig]) -> str:
    """What was typed, without the keys that only this verb has, for another command."""
    typed = [text for text in composed.overrides if split_override(text)[0] not in OWN_KEYS]
    experiment = [f"experiment={composed.experiment}"] if composed.experiment else []
    return "".join(f"{shlex.quote(text)} " for text in [*experiment, *typed])
