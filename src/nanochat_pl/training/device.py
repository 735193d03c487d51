"""The machine that a stage trains on: what was chosen, and what the arithmetic therefore depends on."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.device import choose_compute_dtype, choose_device, device_name, require_kernels
from nanochat_pl.common.device_settings import ComputeDType
from nanochat_pl.common.errors import SharedError, UserError
from nanochat_pl.common.launch_env import launch_env
from nanochat_pl.common.paths import cache_folder
from nanochat_pl.distributed import collectives
from nanochat_pl.model.attention import Case, choose
from nanochat_pl.model.attention.choice import refusals, require, use_newest_kernels
from nanochat_pl.model.config import ModelSettings, resolve_model, window_sizes
from nanochat_pl.model.counts import flops_per_token
from nanochat_pl.model.fp8 import Fp8Backend, why_no_fp8
from nanochat_pl.model.gpt import TORCH_DTYPES
from nanochat_pl.planning import Plan, estimate_cpu_seconds
from nanochat_pl.planning.gpus import peak_flops
from nanochat_pl.training.compile_proof import why_not_compiled_here
from nanochat_pl.training.config import TrainConfig

# Measured by nanochat (dev/LOG.md, 2026-02-02), not here.
FP8_SLOWER_DEPTH, FP8_FASTER_DEPTH = 12, 26
# What compiling takes of a CPU (20 to 60 s), and the share of a step's time that it then saves.
COMPILE_CPU_SECONDS, SAVED_SHARE = 40.0, 0.2


@dataclass(frozen=True)
class Machine:
    """Device, type of the activations, whether the model is compiled, what multiplies in FP8 (None: nothing), and what
    computes attention."""

    device: torch.device
    name: str
    compute_dtype: ComputeDType
    compile: bool
    fp8: Fp8Backend | None = None
    attention: str = ""

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s that the device could reach; None where that is not known: then no MFU is shown.

        With FP8 too it is the peak of the type of the activations, so that MFU compares with that of a run without.
        """
        return peak_flops(self.name, self.compute_dtype)

    @property
    def in_words(self) -> str:
        """The types of numbers that it computes in."""
        emulated = " (emulated)" if self.fp8 == "emulate" else ""
        return self.compute_dtype if self.fp8 is None else f"{self.compute_dtype} with products in FP8{emulated}"

    def choices(self) -> dict[str, Any]:
        """What may change the bits of a result; a resumed run says where they differ."""
        return {
            "device": self.device.type,
            "compute_dtype": self.compute_dtype,
            "compile": self.compile,
            "fp8": self.fp8,
            "num_threads": torch.get_num_threads(),
            "attention": self.attention,
        }


def prepare_machine(config: TrainConfig) -> Machine:
    """Choose the device and how to compute on it, as the settings say; say what was chosen."""
    if config.trainer.num_threads is not None:
        torch.set_num_threads(config.trainer.num_threads)
    device, place = own_device(config.trainer.accelerator), launch_env()
    dtype = choose_compute_dtype(config.model.compute_dtype, device)
    compiled, fp8 = config.trainer.compile, choose_fp8(config, device, dtype)
    if compiled == "auto":
        # What writes answers is eager: then the gradient is of the very probabilities under which they were drawn.
        eager = config.stage.definition.trains_on_answers
        compiled = (
            not eager
            and _given_length_is_worth_it(config, device, dtype)
            and compiler_works(cache_folder(config.paths), device, dtype, config.model, fp8)
        )
    attention, reasons = _attention_of(config, device, dtype, compiled)
    machine = Machine(device, device_name(device), dtype, compiled, fp8=fp8, attention=attention)
    many = f"{place.world_size} processes, each on " if place.world_size > 1 else ""
    rank_zero_print(
        f"Training on {many}{machine.name} in {_in_words(machine, config)}, {'compiled' if compiled else 'eager'}."
    )
    if fp8 == "scaled_mm" and (slower := fp8_slower_remark(config.model.depth, compiled)):
        rank_zero_print(f"trainer.fp8={str(config.trainer.fp8).lower()}: {slower}")
    if device.type == "cuda" or config.trainer.attention != "auto":
        rank_zero_print("; ".join([f"Attention: {attention}", *reasons]) + ".")
    return machine


def with_plan(machine: Machine, config: TrainConfig, plan: Plan) -> Machine:
    """The machine for a stage whose length is known: eager where trainer.compile=auto would cost more than it saves."""
    steps, flops = plan["num_steps"], plan["flops_per_token"] * plan["total_batch_tokens"]
    if config.trainer.compile != "auto" or not machine.compile or _is_worth_compiling(machine.device, steps, flops):
        return machine
    attention, _ = _attention_of(config, machine.device, machine.compute_dtype, compiled=False)
    return dataclasses.replace(machine, compile=False, attention=attention)


def _given_length_is_worth_it(config: TrainConfig, device: torch.device, dtype: ComputeDType) -> bool:
    """False where the settings alone say that compiling does not pay: then the compiler is not even tried."""
    if config.max_steps is None or config.total_batch_tokens is None:
        return True  # the plan will tell
    flops = flops_per_token(resolve_model(config.model, config.tokenizer.vocab_size, dtype))
    return _is_worth_compiling(device, config.max_steps, flops * config.total_batch_tokens)


def _is_worth_compiling(device: torch.device, num_steps: int, flops_per_step: float) -> bool:
    """Whether compiling saves this process more than it takes; where not, that is said. Of GPUs it is taken for true.

    It is counted in seconds of one core, so that all machines of a training come to the same.
    """
    own_flops = num_steps * flops_per_step / launch_env().world_size
    if device.type != "cpu" or estimate_cpu_seconds(own_flops, 1) * SAVED_SHARE > COMPILE_CPU_SECONDS:
        return True
    rank_zero_print(
        f"torch.compile: not worth it for {num_steps:,} steps of so little: training eagerly (trainer.compile=true"
        " compiles)."
    )
    return False


def _attention_of(
    config: TrainConfig, device: torch.device, dtype: ComputeDType, compiled: bool
) -> tuple[str, list[str]]:
    """What computes attention in which windows, and why not what would be preferred.

    Raises:
        UserError: ``trainer.attention`` does not run here.
    """
    model, wanted, reasons = config.model, config.trainer.attention, dict[str, str]()
    kind, length = TORCH_DTYPES[dtype], model.sequence_len
    if device.type == "cuda" and wanted in ("auto", "varlen"):
        newest = use_newest_kernels(device, kind, model.head_dim, model.document_mask)
        reasons |= {name: reason for name, reason in newest.items() if reason is not None}
    windows = sorted({*window_sizes(model)})
    cases = [Case(kind, window, length, model.head_dim, model.document_mask, compiled) for window in windows]
    require(device, cases, wanted, "trainer.attention")
    taken: dict[str, list[int]] = {}
    for case in cases:
        taken.setdefault(choose(device, case, wanted), []).append(case.window)
        reasons |= {name: reason for name, reason in refusals(device, case, wanted) if reason is not None}
    said = [f"{name} in windows of {' and '.join(f'{each:,}' for each in found)}" for name, found in taken.items()]
    refused = [f"not {name}: {reason}" for name, reason in reasons.items() if name not in taken]
    return ", ".join(said if len(said) > 1 else taken), refused


def choose_fp8(config: TrainConfig, device: torch.device, dtype: ComputeDType) -> Fp8Backend | None:
    """What ``trainer.fp8`` means on a device; where it is asked for and left out, the reason is said.

    Raises:
        UserError: it is asked for, and the device has none.
    """
    wanted = config.trainer.fp8
    if wanted is False:
        return None
    if config.stage.definition.trains_on_answers:
        rank_zero_print(
            f"trainer.fp8={str(wanted).lower()}: {config.stage.name} trains without it, so that the gradient is of the"
            " very probabilities under which answers were drawn."
        )
        return None
    reason = why_no_fp8(device, TORCH_DTYPES[dtype], config.model.sequence_len, emulated=wanted == "emulate")
    if reason is None:
        return "emulate" if wanted == "emulate" else "scaled_mm"
    if wanted == "auto":
        rank_zero_print(f"No FP8: {reason}.")
        return None
    raise UserError(
        f"trainer.fp8={str(wanted).lower()}: cannot be had on {device_name(device)}: {reason}.",
        fix="Leave it out, or set trainer.fp8=auto, which takes it where it is.",
    )


def fp8_slower_remark(depth: int, compiled: bool) -> str | None:
    """What speaks for a training in FP8 being slower than in bfloat16; None: nothing that is known."""
    if not compiled:
        return "without trainer.compile the scaling takes more time than the products save."
    if depth <= FP8_SLOWER_DEPTH:
        return (
            f"model.depth={depth} is likely to be slower with it than without. nanochat's log of 2026-02-02 (8 × H100)"
            f" has depth {FP8_SLOWER_DEPTH} slower and depth {FP8_FASTER_DEPTH} 1.17 times as fast."
        )
    return None


def _in_words(machine: Machine, config: TrainConfig) -> str:
    if machine.compute_dtype != "float16":
        return machine.in_words
    chosen = "; it has no units for bfloat16" if config.model.compute_dtype == "auto" else ""
    return f"float16 (with a loss scale{chosen})"


def own_device(accelerator: str, key: str = "trainer.accelerator") -> torch.device:
    """The device of this process that a setting means: of several GPUs the one with its number on this machine.

    Where a launcher shows each process one GPU, it is that: :func:`require_own_gpus` finds out whether it is its own.
    ``key`` is what the setting is called, for messages.

    Raises:
        UserError: there is none.
    """
    device, place = choose_device(accelerator, key), launch_env()
    require_kernels(device)
    if device.type != "cuda" or place.world_size == 1:
        return device
    found = torch.cuda.device_count()
    if found == 1:
        return torch.device("cuda", 0)
    if place.local_rank >= found:
        raise UserError(
            f"{place.local_world_size} processes on a machine where PyTorch sees {found} GPUs: each needs one.",
            fix=f"Start {found} processes, or use {key}=cpu.",
        )
    return torch.device("cuda", place.local_rank)


def require_own_gpus(device: torch.device, key: str = "trainer.accelerator") -> None:
    """Refuse processes that would share a GPU. All of them call it. ``key``: as in :func:`own_device`.

    Raises:
        SharedError: two have the same one.
    """
    if collectives.world_size() == 1:
        return
    place, own = launch_env(), ""
    if device.type == "cuda":
        # Parts of a GPU that is divided have its number, and differ in what each process sees.
        number = getattr(torch.cuda.get_device_properties(device), "uuid", "")
        own = f"{place.rank - place.local_rank} {number} {device.index} {os.environ.get('CUDA_VISIBLE_DEVICES')}"
    everyones = collectives.all_gather_str(own)
    for rank, gpu in enumerate(everyones):
        if gpu and (other := everyones.index(gpu)) < rank:
            raise SharedError(
                f"Processes {other} and {rank} have the same GPU: each needs one of its own.",
                fix="Start as many processes on each machine as it has GPUs, and let each see all of them, or one of"
                f" its own (CUDA_VISIBLE_DEVICES); or use {key}=cpu.",
            )


def compiler_works(
    cache: Path, device: torch.device, dtype: ComputeDType, settings: ModelSettings, fp8: Fp8Backend | None = None
) -> bool:
    """Whether a compiled model of this kind runs here and is right; where not, the reason is said."""
    reason = why_not_compiled_here(cache, device, dtype, settings, fp8)
    if reason is not None:
        rank_zero_print(f"torch.compile: {reason}: training eagerly.")
    return reason is None
