"""How Lightning sees the processes of a training: one device each, no wrapper around the model.

Gradients are summed by the optimizer, the process group is there before Lightning is, and each process is where
the launcher put it. So nothing of Lightning's own launching and grouping is wanted: of what it calls a strategy there
remain the few things that its Trainer and the callbacks of others ask for.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.nn import Module

from nanochat_pl.common import distributed
from nanochat_pl.common.place import launched_place


class OneDeviceEach(SingleDeviceStrategy):
    """Each process trains on one device; with one process, Lightning's own strategy for one device."""

    def __init__(self, device: torch.device) -> None:
        place = launched_place()
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", place.local_rank)
        super().__init__(device)
        self.global_rank, self.local_rank = distributed.rank(), place.local_rank
        self.world_size = distributed.world_size()
        # Lightning takes it from the environment, also where a launcher has started one process for each of many jobs.
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    @property
    def is_global_zero(self) -> bool:
        """Whether this process writes files."""
        return self.global_rank == 0

    def _setup_model(self, model: Module) -> Module:
        """All processes begin with the weights of the main one, which are the same anyway."""
        for tensor in model.state_dict().values():
            distributed.broadcast_(tensor)
        if self.world_size > 1:
            use_all_collectives(self.root_device)
        return model

    def teardown(self) -> None:
        """As Lightning's, but that model and optimizer stay on their device: what follows a fit is computed there."""
        assert self.accelerator is not None
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all processes."""
        distributed.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Plain data of one process, for all."""
        return obj if self.world_size == 1 else json.loads(distributed.from_all(json.dumps(obj))[src])

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The mean or the sum of a tensor over all processes."""
        if self.world_size == 1 or not isinstance(tensor, Tensor):
            return tensor
        assert str(reduce_op).lower() in ("mean", "avg", "sum"), reduce_op
        total = tensor.clone()
        distributed.sum_(total)
        return total if str(reduce_op).lower() == "sum" else total / self.world_size

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """The tensors of all processes, stacked."""
        if self.world_size == 1:
            return tensor
        assert not sync_grads, "gradients of several processes are summed by the optimizer"
        gathered = tensor.new_zeros(self.world_size, *tensor.shape)
        gathered[self.global_rank] = tensor
        distributed.sum_(gathered)
        return gathered

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all of the processes say so, or any."""
        count = distributed.total(decision)
        return count == self.world_size if all else count > 0


def use_all_collectives(device: torch.device) -> None:
    """Let each collective of a step take the buffers that it keeps, before activations fill the memory."""
    ones = torch.ones(distributed.world_size(), device=device)
    part = ones.new_empty(1)
    distributed.start_reduce_scatter(part, ones).wait()
    distributed.start_all_gather(ones, part).wait()
    distributed.sum_(ones)
