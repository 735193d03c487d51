"""The plan of pretraining with memory, time, cost and text, and what else is to be said of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from nanochat_pl.cli.plan import PlanConfig
from nanochat_pl.common.console import print_table, rank_zero_print
from nanochat_pl.common.device import FP8_CAPABILITY, choose_compute_dtype, choose_device, num_devices
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.launch_env import usable_cpus
from nanochat_pl.common.paths import cache_folder
from nanochat_pl.data.sources.auto import choose_data
from nanochat_pl.data.sources.token_counts import text_facts, tokens_by_source
from nanochat_pl.model.attention import Kernels, kernels_of
from nanochat_pl.model.attention.flex import has_flex_attention
from nanochat_pl.model.attention.varlen import has_varlen_with_windows
from nanochat_pl.model.config import resolve_model
from nanochat_pl.planning import Plan, plan_sections, width_remark
from nanochat_pl.planning.estimates import add_machine, add_memory, add_time, device_remarks
from nanochat_pl.planning.gpus import detected_device, named_device
from nanochat_pl.planning.horizon import MAX_EPOCHS
from nanochat_pl.planning.measured import measured_mfu
from nanochat_pl.planning.text import add_text
from nanochat_pl.training.config import TrainConfig
from nanochat_pl.training.device import fp8_slower_remark
from nanochat_pl.training.stage_data.base_plan import Target, base_plan, bounding_tokens, would_refuse
from nanochat_pl.training.stage_data.source import tokens_planned


def print_plan(config: TrainConfig) -> None:
    """Print the plan of these settings on this machine, for a check."""
    show_plan(full_plan(config))


def show_plan(full: FullPlan) -> None:
    """Print a plan as a table for each section, and the remarks."""
    rank_zero_print(f"Plan for {full.target.device.name}", style="bold")
    for title, rows in plan_sections(full.plan).items():
        rank_zero_print()
        print_table(("value", "", "how it follows", "set by"), rows, title=title)
    rank_zero_print()
    for remark in full.remarks:
        rank_zero_print(f"- {remark}")


class FullPlan(NamedTuple):
    """The plan of pretraining with memory, time, cost and text, and what else is known with it.

    Attributes:
        config: the settings, with ``data=auto`` made concrete.
        remarks: what a person should know before training it.
        refused: what train says if it does not take these settings unasked.
    """

    plan: Plan
    config: PlanConfig
    target: Target
    remarks: list[str]
    refused: UserError | None


def full_plan(config: TrainConfig) -> FullPlan:
    """Plan pretraining as far as it can be told without training."""
    ours = config if isinstance(config, PlanConfig) else PlanConfig(**vars(config))
    ours, target, at_hand = _concrete(ours)
    cache, vocab_size = cache_folder(ours.paths), ours.tokenizer.vocab_size
    device, options = target.device, target.row_options(ours)
    plan = base_plan(ours, target, vocab_size, at_hand)
    model = resolve_model(ours.model, vocab_size, target.compute_dtype)
    fp8, fp8_remarks = _fp8(ours, target)
    add_machine(plan, model, options, _kernels(ours, target), ours.trainer.attention, fp8)
    memory = add_memory(plan, model, options)
    add_time(plan, model, options, usable_cpus(), _given_mfu(ours, target, fp8), ours.price_per_hour)
    add_text(plan, text_facts(ours.data, cache, vocab_size))
    remarks = [*filter(None, [width_remark(plan)]), *device_remarks(plan, memory, device)]
    remarks += [*_remarks_on_settings(ours, plan, target), *fp8_remarks, *_epochs_by_source(ours, plan)]
    refused = would_refuse(ours, plan, target, at_hand)
    if refused is not None:
        remarks.append(f"train refuses it unasked: {' '.join(refused.problems)} {refused.fix}")
    return FullPlan(plan, ours, target, remarks, refused)


def _concrete(config: PlanConfig) -> tuple[PlanConfig, Target, int | None]:
    """The settings with data=auto made concrete, what is planned for, and the tokens that bound the batch."""
    cache = cache_folder(config.paths)
    concrete = dataclasses.replace(config, data=choose_data(config.data, tokens_planned(config), cache))
    return concrete, _target(concrete), bounding_tokens(concrete.data, concrete.tokenizer.vocab_size, cache)


def _kernels(config: PlanConfig, target: Target) -> Kernels:
    """What attention can choose from there; of a GPU by name what its types tell of its generation."""
    if config.hardware is None or target.device.type == "cpu":
        return kernels_of(
            choose_device("cpu" if config.hardware else config.trainer.accelerator, "trainer.accelerator")
        )
    capability = (8, 0) if target.device.bfloat16 else (7, 0)
    return Kernels("cuda", capability, has_varlen_with_windows(), has_flex_attention())


def _given_mfu(config: PlanConfig, target: Target, fp8: bool) -> tuple[str, float] | None:
    """Where the MFU is not to be assumed: how it was given, and what it is."""
    if config.mfu is not None:
        return f"mfu={config.mfu}", config.mfu
    if config.bench is None:
        return None
    found = measured_mfu(Path(config.bench), target.device, config.model.depth, fp8)
    return f"bench: {found.in_words}", found.mfu


def _fp8(config: PlanConfig, target: Target) -> tuple[bool, list[str]]:
    """Whether the blocks multiply in FP8 there, and what is to be said of it."""
    wanted = config.trainer.fp8
    if wanted is False:
        return False, []
    said = f"trainer.fp8={str(wanted).lower()}"
    if wanted == "emulate":
        return True, [f"{said}: it rounds as FP8 does, and is slower than without."]
    if not target.device.fp8 or target.compute_dtype != "bfloat16":
        needs = f"{target.device.name} in {target.compute_dtype} has none: it is for GPUs of NVIDIA with compute"
        needs += f" capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or higher, in bfloat16"
        return False, [f"{said}: {needs}{'' if wanted == 'auto' else '; train refuses it'}."]
    remark = fp8_slower_remark(config.model.depth, target.compiled)
    return True, [] if remark is None else [f"{said}: {remark}"]


def _target(config: PlanConfig) -> Target:
    """What to plan for: GPUs by their name, or those of this machine."""
    wanted, compiled = config.model.compute_dtype, config.trainer.compile
    if config.hardware is None or config.hardware.lower() == "cpu":
        accelerator = "cpu" if config.hardware else config.trainer.accelerator
        here = choose_device(accelerator, "trainer.accelerator")
        number = config.num_devices or num_devices(config.trainer.devices, here, "trainer.devices")
        dtype = choose_compute_dtype(wanted, here)
        compiles = here.type != "mps" if compiled == "auto" else compiled
        return Target.here(detected_device(here), dtype, number, number, compiles)
    device = named_device(config.hardware)
    asked = config.trainer.devices
    number = config.num_devices or (1 if asked == "auto" else asked) * config.trainer.num_nodes
    dtype = ("bfloat16" if device.bfloat16 else "float16") if wanted == "auto" else wanted
    return Target(device, dtype, number, True if compiled == "auto" else compiled)


def _remarks_on_settings(config: PlanConfig, plan: Plan, target: Target) -> list[str]:
    remarks, number = [], target.num_devices
    step_flops = plan["flops_per_token"] * plan["total_batch_tokens"]
    if config.max_steps is None and config.flops_budget is not None and config.flops_budget < step_flops:
        remarks.append(
            f"flops_budget={config.flops_budget:g}: is less than one step takes, {step_flops:.3g}; one step is made."
        )
    if target.device.type == "cpu" and config.mfu is not None:
        remarks.append("mfu is not used for a CPU, whose peak is not known: its time is that of an assumed core.")
    if number > 1:
        remarks.append(
            f"Memory is that of one of {number} devices, with its share of the optimizer's state; the time is theirs"
            " together, whatever they lose in talking to each other being part of mfu."
        )
    if number > plan["rows_per_step"]:
        remarks.append(
            f"num_devices={number}: a step has {plan['rows_per_step']:,} rows, so the other devices would"
            " have none and the time is not to be had: take fewer, or a larger total_batch_tokens."
        )
    return remarks


def _epochs_by_source(config: PlanConfig, plan: Plan) -> list[str]:
    """Of a mixture what each source gives, and how often it is read for that."""
    known = tokens_by_source(config.data, cache_folder(config.paths), config.tokenizer.vocab_size)
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
