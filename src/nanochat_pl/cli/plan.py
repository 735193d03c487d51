"""Shows what follows from the depth, each value with its reason, and what it costs, without training.

nanochat-pl plan model.depth=12
nanochat-pl plan model.depth=20 data=climbmix hardware=h100 num_devices=8 price_per_hour=2.5
nanochat-pl plan model.depth=12 explain=total_batch_tokens
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanochat_pl.common.console import next_steps, rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.imports import loading_libraries
from nanochat_pl.common.paths import cache_folder
from nanochat_pl.common.schema import UserPath, setting
from nanochat_pl.config.compose import Composed
from nanochat_pl.config.experiment import compose_step
from nanochat_pl.config.overrides import split_override
from nanochat_pl.data.sources.hub import HubFiles
from nanochat_pl.model.config import resolve_model
from nanochat_pl.planning.horizon import CPU_EXAMPLE
from nanochat_pl.planning.memory import step_memory
from nanochat_pl.training.config import TrainConfig

if TYPE_CHECKING:
    from nanochat_pl.cli._full_plan import FullPlan
    from nanochat_pl.training.stage_data.base_plan import Target


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """The root of configs/plan.yaml: the keys of train, a device to plan for, and what to explain."""

    hardware: str | None = setting(None, "A GPU to plan for, e.g. h100, a100-80gb, rtx-4090; null: this machine's.")
    num_devices: int | None = setting(
        None, "So many of them, data parallel; null: one of hardware, or trainer.devices.", at_least=1, at_most=2**16
    )
    mfu: float | None = setting(
        None, "Share of the GPU's peak that the training reaches; null: assumed.", above=0, at_most=1
    )
    bench: UserPath | None = setting(
        None, "What make bench-gpu wrote: its measured MFU, at the nearest depth, in place of the assumed one."
    )
    price_per_hour: float | None = setting(
        None, "Price of one device for an hour, in any currency; null: no cost.", at_least=0, at_most=1e9
    )
    explain: str | None = setting(None, "One value of the plan, with its formula, its inputs and what overrode it.")


Config = PlanConfig
HELP_KEYS = ("model.depth", "model.sequence_len", "tokenizer.vocab_size", "trainer.accelerator")
OWN_KEYS = ("hardware", "num_devices", "mfu", "bench", "price_per_hour", "explain")


def run(arguments: Sequence[str]) -> int:
    """The command."""
    composed: Composed[PlanConfig] = compose_step("plan", "base", PlanConfig, arguments)
    config = composed.config
    if not config.stage.definition.from_scratch:
        raise UserError(
            f"stage={config.stage.name}: only base is planned from its settings alone.",
            "The plan of a later stage follows from its parent; it is in the stage's plan.json when that has begun.",
        )
    with loading_libraries():
        from nanochat_pl.cli._full_plan import full_plan, show_plan
    full = full_plan(config)
    if config.explain is not None:
        rank_zero_print(full.plan.explain(config.explain))
        return 0
    show_plan(full)
    rank_zero_print()
    typed = _typed(composed)
    next_steps(
        [
            ("one value with its inputs", _command("plan", *typed, "explain=total_batch_tokens")),
            _how_to_train(typed, full),
        ]
    )
    return 0


def _how_to_train(typed: Sequence[str], full: FullPlan) -> tuple[str, str]:
    """The command that trains this, as far as the machine that it is typed on takes it; what was planned for another
    machine is to be typed there."""
    command = _command("train", *typed)
    if full.config.hardware is not None:
        return "train it there", command
    if full.refused is None:
        if (first := _to_fetch(full.config)) is not None:
            return "fetch its data first", first
        fits = _fits(full.config, full.target)
        return ("train it", command) if fits else ("plan a smaller one", _smaller(typed, full.config.model.depth))
    if full.target.device.type == "cpu":
        kept = [text for text in typed if not text.startswith(("model.depth=", "max_steps="))]
        return "train what a CPU can", f"{_command('train', *kept)} {CPU_EXAMPLE}"
    return "train it all the same", f"{command} yes=true"


def _to_fetch(config: PlanConfig) -> str | None:
    """The command that fetches what a training would miss: it fetches nothing itself here. None: nothing is missing."""
    cache = cache_folder(config.paths)
    for part in config.data.opened:
        if part.is_on_hub and not part.download:
            try:
                HubFiles(part, cache).shards("train")
            except UserError as error:
                return next(
                    (error.fix[place:] for place in [error.fix.find("nanochat-pl download")] if place >= 0), None
                )
    return None


def _fits(config: PlanConfig, target: Target) -> bool:
    """Whether a step with one row fits into the memory of a device."""
    model = resolve_model(config.model, config.tokenizer.vocab_size, target.compute_dtype)
    on_cpu, device = target.device.type == "cpu", target.device
    step = step_memory(model, 1, on_cpu=on_cpu, processes=target.num_devices, gpu_memory=device.gpu_memory)
    return device.memory_bytes is None or step.total <= device.memory_bytes


def _smaller(typed: Sequence[str], depth: int) -> str:
    kept = [text for text in typed if not text.startswith("model.depth=")]
    return _command("plan", *kept, f"model.depth={max(1, depth // 2)}")


def _typed(composed: Composed[PlanConfig]) -> list[str]:
    """What was typed, without the keys that only this command has, for another command."""
    typed = [text for text in composed.overrides if split_override(text)[0] not in OWN_KEYS]
    experiment = [f"experiment={composed.experiment}"] if composed.experiment else []
    return [*experiment, *typed]


def _command(command: str, *overrides: str) -> str:
    return f"nanochat-pl {command} {shlex.join(overrides)}".rstrip()
