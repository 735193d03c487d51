"""All processes hold the same weights, or the training ends: a cheap check every few steps.

Each process updates a share of the parameters and gets the rest from the others, so a fault of a device, of a
connection or of a program shows as weights that differ. Nothing else would tell: the loss goes on falling for a while.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from nanochat_pl.common.errors import SharedError, listed
from nanochat_pl.distributed import collectives
from nanochat_pl.optim.fully_sharded import is_sharded

_MAX_NAMED = 5
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WeightSyncCheck(Callback):
    """Holds the weights of all processes against each other. With one process it does nothing.

    Args:
        every_steps: steps between two checks, besides the one before each resume file; 0: never.
    """

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step."""
        if self.every_steps and trainer.global_step % self.every_steps == 0:
            require_same_weights(_shared_weights(pl_module), trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Before a resume file is written: it has the weights of the main process, and must not pass on a fault."""
        if self.every_steps:
            require_same_weights(_shared_weights(pl_module), trainer.global_step)


def _shared_weights(module: LightningModule) -> dict[str, Tensor]:
    """Those that each process has: all, or none where they are sharded."""
    return {name: each for name, each in module.named_parameters() if not is_sharded(each)}


def require_same_weights(parameters: Mapping[str, Tensor], step: int) -> None:
    """Compare parameters over all processes, bit by bit: one number of each goes from the device to the host.

    Raises:
        SharedError: they differ; names the parameters and the processes.
    """
    if collectives.world_size() == 1 or not parameters:
        return
    sums = checksums(parameters)
    digest = int.from_bytes(hashlib.blake2b(json.dumps(sums).encode(), digest_size=7).digest(), "big")
    # The largest is also the smallest only where all are the same.
    if collectives.all_reduce_max(digest) == -collectives.all_reduce_max(-digest):
        return
    of_all = collectives.all_gather_plain(sums)
    differing = [name for n, name in enumerate(parameters) if len({each[n] for each in of_all}) > 1]
    groups: dict[tuple[int, ...], list[str]] = {}
    for rank, each in enumerate(of_all):
        groups.setdefault(tuple(each), []).append(str(rank))
    raise SharedError(
        f"step {step}: the processes hold different weights: {listed(differing, _MAX_NAMED)}; processes "
        f"{' | '.join(', '.join(ranks) for ranks in groups.values())} differ from each other.",
        fix="The last resume file was written before: the same command goes on. Where it happens again, a device"
        " or a connection is at fault: nanochat-pl selftest, and the machine's own tests of its memory.",
    )


@torch.no_grad()
def checksums(tensors: Mapping[str, Tensor]) -> list[int]:
    """A number of each tensor's bits; one bit more or less always changes it."""
    sums = [
        tensor.detach().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors.values()
    ]
    return torch.stack(sums).tolist()
