"""What a stage needs of memory and disk, held against what is there before any work is done."""

from __future__ import annotations

from pathlib import Path

import torch

from nanochat_pl.common.device import gpu_memory_bytes, memory_bytes
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import free_bytes
from nanochat_pl.common.launch_env import launch_env
from nanochat_pl.model.config import GPTConfig
from nanochat_pl.model.counts import count_parameters, weight_bytes
from nanochat_pl.planning.memory import NO_KNOBS, MemoryKnobs, resume_copy_bytes, step_memory
from nanochat_pl.training.config import memory_knobs
from nanochat_pl.training.stages.registry import StageContext

COPIES_IN_FILE = 3  # weights and two moments


def require_room_for(context: StageContext, model: GPTConfig) -> None:
    """As :func:`require_room`, for a stage that is to be trained."""
    config, trainer = context.config, context.config.trainer
    num_files = trainer.keep_last + trainer.keep_best
    sharded = trainer.strategy == "fsdp"
    require_room(model, context.machine.device, context.folder.path, num_files, memory_knobs(config), sharded)


def require_room(
    model: GPTConfig,
    device: torch.device,
    folder: Path,
    num_files: int,
    knobs: MemoryKnobs = NO_KNOBS,
    sharded: bool = False,
) -> None:
    """Refuse a model whose step with one row does not fit into memory, and a disk that the stage's files would fill.

    Args:
        model: the architecture.
        device: where it is trained.
        folder: where the files go: one resume file more than is kept, and a bundle.
        num_files: resume files that are kept.
        knobs: what trades time for memory.
        sharded: whether weights and gradients are divided among the processes.

    Raises:
        UserError: memory or disk is too small; with the sizes.
    """
    needed, memory = min_memory(model, device, knobs, sharded), memory_bytes(device)
    on_cpu = device.type == "cpu"
    copied = f", {_size(resume_copy_bytes(model))} of it while a resume file is written" if on_cpu else ""
    if needed > memory:
        raise UserError(
            f"{count_parameters(model)['total']:,} parameters: a step with one row of {model.sequence_len:,} tokens "
            f"takes {_size(needed)}{copied}, the {device.type} has {_size(memory)}.",
            fix=f"Use {', or '.join(_ways_to_fit(device, knobs, sharded))}.",
        )
    in_files, free = COPIES_IN_FILE * weight_bytes(model) * (num_files + 2), free_bytes(folder)
    there = sum(path.stat().st_size for path in folder.glob("checkpoints/step=*.ckpt"))  # of a stage that goes on
    if in_files > free + there:
        raise UserError(
            f"{folder}: the stage writes up to {_size(in_files)}, the disk has {_size(free)} free.",
            fix="Free some space, or set paths.runs=… to a folder on another disk.",
        )


def _ways_to_fit(device: torch.device, knobs: MemoryKnobs, sharded: bool) -> list[str]:
    """What takes less memory and is not used yet."""
    ways = [] if knobs.activation_checkpointing else ["trainer.activation_checkpointing=true"]
    if device.type != "cpu" and launch_env().world_size > 1 and not sharded:
        ways.append("trainer.strategy=fsdp")
    smaller = "model.depth, model.aspect_ratio, model.sequence_len or tokenizer.vocab_size"
    return [*ways, f"a smaller model: of stage=base {smaller}"]


def min_memory(model: GPTConfig, device: torch.device, knobs: MemoryKnobs = NO_KNOBS, sharded: bool = False) -> int:
    """Bytes that a step with one row at once takes of a device's memory.

    Each of several processes keeps its share of the optimizer's state, and where they are sharded of weights and
    gradients; but all weights are there at the start. Processes of one machine share a CPU's memory, which also has the
    copy that the main one writes resume files from.
    """
    place, on_cpu = launch_env(), device.type == "cpu"
    step = step_memory(
        model, 1, on_cpu=on_cpu, knobs=knobs, processes=place.world_size, gpu_memory=gpu_memory_bytes(device)
    )
    divided = (step.weights + step.gradients) * (place.world_size - 1) // place.world_size if sharded else 0
    most = max(step.total - divided, step.weights + step.libraries)
    return most * place.local_world_size + resume_copy_bytes(model) if on_cpu else most


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:,.1f} GiB"
