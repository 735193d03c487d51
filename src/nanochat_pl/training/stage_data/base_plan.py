"""The plan of pretraining: what ``plan`` shows and what ``train`` does are made here, from the same facts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from nanochat_pl.common.device_settings import ComputeDType
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.launch_env import launch_env, usable_cpus
from nanochat_pl.data.sources.base import DataSettings
from nanochat_pl.data.sources.run_corpus import RunCorpus
from nanochat_pl.data.sources.token_counts import tokens_at_hand
from nanochat_pl.distributed import collectives
from nanochat_pl.planning import Plan, check_horizon, estimate_cpu_seconds, make_plan
from nanochat_pl.planning.batch_size import RowOptions
from nanochat_pl.planning.gpus import Device, detected_device
from nanochat_pl.training.config import TrainConfig, row_options
from nanochat_pl.training.device import Machine


@dataclass(frozen=True)
class Target:
    """What a plan is made for.

    Attributes:
        device: each of them.
        compute_dtype: of the model there.
        num_devices: one process each, data parallel.
        compiled: whether the model is.
    """

    device: Device
    compute_dtype: ComputeDType
    num_devices: int = 1
    compiled: bool = False

    @classmethod
    def here(
        cls, device: Device, compute_dtype: ComputeDType, num_devices: int, on_machine: int, compiled: bool
    ) -> Target:
        """Of this machine, whose processes, ``on_machine`` of them, share a CPU's memory."""
        if device.type == "cpu" and device.memory_bytes is not None:
            device = replace(device, memory_bytes=device.memory_bytes // on_machine)
        return cls(device, compute_dtype, num_devices, compiled)

    def row_options(self, config: TrainConfig) -> RowOptions:
        """What the plan of the rows needs."""
        return row_options(config, self.device, self.num_devices, self.compiled)


def target_of(machine: Machine) -> Target:
    """What a plan for this machine's processes is made for."""
    device, here = detected_device(machine.device), launch_env().local_world_size
    return Target.here(device, machine.compute_dtype, collectives.world_size(), here, machine.compile)


def bounding_tokens(data: DataSettings, vocab_size: int, cache: Path, corpus: RunCorpus | None = None) -> int | None:
    """About how many tokens one epoch has, which bounds the batch; None where it does not.

    An estimate from bytes of text, so that it is the same before and after they have been tokenized. None for data sets
    of a hub, and for text that is tokenized while the training runs: how much is here would decide.
    """
    if any(part.shuffle != "global" or part.is_on_hub for part in data.opened):
        return None
    return tokens_at_hand(data, cache, vocab_size, corpus or RunCorpus(cache))


def base_plan(config: TrainConfig, target: Target, vocab_size: int, at_hand: int | None) -> Plan:
    """The plan of pretraining with these settings.

    Args:
        config: ``data`` is concrete, not auto.
        vocab_size: of the tokenizer.
        at_hand: of :func:`bounding_tokens`; None also where the text is not known yet.

    Raises:
        UserError: total_batch_tokens is no whole number of rows.
    """
    return make_plan(
        config.model,
        config,
        config.optim,
        vocab_size=vocab_size,
        compute_dtype=target.compute_dtype,
        schedule=config.schedule,
        tokens_at_hand=at_hand,
        options=target.row_options(config),
    )


def refuse_unasked(config: TrainConfig, plan: Plan, target: Target, at_hand: int | None) -> None:
    """Refuse a horizon that the plan came to by itself and that nobody would want, unless ``yes=true``.

    Raises:
        UserError: see :func:`check_horizon`.
    """
    if config.yes:
        return
    seconds = None
    if target.device.type == "cpu":
        seconds = estimate_cpu_seconds(plan["total_flops"], usable_cpus())
    check_horizon(plan, at_hand, seconds, crops=config.data.packing_mode == "crop")


def would_refuse(config: TrainConfig, plan: Plan, target: Target, at_hand: int | None) -> UserError | None:
    """What :func:`refuse_unasked` would raise."""
    try:
        refuse_unasked(config, plan, target, at_hand)
    except UserError as error:
        return error
    return None
