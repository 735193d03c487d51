"""What a stage needs of memory and disk, held against what is there before any work is done."""

from __future__ import annotations

from pathlib import Path

import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import free_bytes
from nanochat_pl.common.hardware import memory_bytes
from nanochat_pl.model.accounting import count_parameters, weight_bytes
from nanochat_pl.model.config import GPTConfig

# Weights, gradients and two moments in memory; weights and two moments in a file.
COPIES_IN_MEMORY, COPIES_IN_FILE = 4, 3


def require_room(model: GPTConfig, device: torch.device, folder: Path, keep_last: int) -> None:
    """Refuse a model that the device cannot hold, and a disk that the stage's files would fill.

    Args:
        model: the architecture.
        device: where it is trained.
        folder: where the files go: one resume file more than is kept, and a bundle.
        keep_last: resume files that are kept.

    Raises:
        UserError: memory or disk is too small; with the sizes.
    """
    in_memory, memory = COPIES_IN_MEMORY * weight_bytes(model), memory_bytes(device)
    if in_memory > memory:
        raise UserError(
            f"{count_parameters(model)['total']:,} parameters: weights, gradients and optimizer take "
            f"{_size(in_memory)}, the {device.type} has {_size(memory)}.",
            fix="Use a smaller model.depth, model.aspect_ratio or tokenizer.vocab_size.",
        )
    in_files, free = COPIES_IN_FILE * weight_bytes(model) * (keep_last + 2), free_bytes(folder)
    if in_files > free:
        raise UserError(
            f"{folder}: the stage writes up to {_size(in_files)}, the disk has {_size(free)} free.",
            fix="Free some space, or set paths.runs=… to a folder on another disk.",
        )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:,.1f} GiB"
