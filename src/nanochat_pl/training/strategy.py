"""Lightning's strategies as they are used here: one device, or its DDP without the wrapper around the model.

With several processes gradients are summed by the optimizer, the process group is there before Lightning is, and each
process is where the launcher put it. So nothing of Lightning's own launching and grouping is wanted: there remain the
few things that its Trainer and the callbacks of others ask a strategy for. One process alone has a strategy for one
device, which every accelerator takes: an Apple GPU refuses those of the DDP family.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.launch_env import launch_env
from nanochat_pl.distributed import collectives
from nanochat_pl.training.fully_sharded import whole_state
from nanochat_pl.training.module import LMModule


class Launched(ClusterEnvironment):
    """Where the launcher put this process. Lightning then looks for no launcher itself, and starts nothing."""

    creates_processes_externally = True
    main_address, main_port = "", 0  # the processes speak to each other already

    @staticmethod
    def detect() -> bool:
        """Never: it is given."""
        return False

    def world_size(self) -> int:
        """How many processes train together."""
        return collectives.world_size()

    def global_rank(self) -> int:
        """The number of this process among them."""
        return collectives.rank()

    def local_rank(self) -> int:
        """Its number on this machine."""
        return launch_env().local_rank

    def node_rank(self) -> int:
        """The number of the machine, where all have as many processes."""
        return launch_env().rank // launch_env().local_world_size

    def set_world_size(self, size: int) -> None:
        """The launcher has set it."""

    def set_global_rank(self, rank: int) -> None:
        """The launcher has set it."""


def strategy_for(
    device: torch.device, name: Literal["auto", "ddp", "fsdp"] = "auto"
) -> OneDevice | UnwrappedDDP | WrappedDDP | FullySharded:
    """The strategy of this process, which trains on ``device``; with one process there is nothing to choose.

    Args:
        device: with or without an index.
        name: ``trainer.strategy``. With ``ddp`` the model is in Lightning's wrapper; the optimizer sums the gradients
            all the same, so the losses are those of ``auto``. With ``fsdp`` weights and gradients are sharded too.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", launch_env().local_rank)
    if collectives.world_size() == 1:
        return OneDevice(device)
    return {"auto": UnwrappedDDP, "ddp": WrappedDDP, "fsdp": FullySharded}[name](device)


class _StaysOnDevice:
    """A strategy whose model and optimizer stay on their device: what follows a fit is computed there."""

    accelerator: Any
    precision_plugin: Any
    checkpoint_io: Any

    def teardown(self) -> None:
        """As Lightning's, but that nothing is moved to the host."""
        assert self.accelerator is not None
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


class OneDevice(_StaysOnDevice, SingleDeviceStrategy):
    """One process on one device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device=device)
        self.set_world_ranks()

    def set_world_ranks(self) -> None:
        """It is the only one, also where Slurm has started one process for each of many jobs."""
        rank_zero_only.rank = 0  # type: ignore[attr-defined]


class WrappedDDP(_StaysOnDevice, DDPStrategy):
    """Lightning's DDP as it is, on the process group that there is."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(parallel_devices=[device], cluster_environment=Launched())

    @property
    def root_device(self) -> torch.device:
        """The device of this process."""
        assert self.parallel_devices is not None
        return self.parallel_devices[0]


class UnwrappedDDP(WrappedDDP):
    """Each process trains on one device of its own, on a model without a wrapper."""

    def _configure_launcher(self) -> None:
        """The processes are there."""

    def set_world_ranks(self) -> None:
        """Lightning takes it from the environment, also where a launcher has started one process for each of many
        jobs."""
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def setup_distributed(self) -> None:
        """The process group is there."""

    def configure_ddp(self) -> None:
        """In place of a wrapper: all processes begin with the weights of the main one, which are the same anyway."""
        assert self.model is not None
        for tensor in self.model.state_dict().values():
            collectives.broadcast_(tensor)
        if self.world_size > 1:
            use_all_collectives(self.root_device)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all processes."""
        collectives.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Plain data of one process, for all."""
        return obj if self.world_size == 1 else collectives.all_gather_plain(obj)[src]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Mean (``avg``), sum, maximum or minimum of a tensor over all processes.

        Raises:
            UserError: another operation.
        """
        if self.world_size == 1 or not isinstance(tensor, Tensor):
            return tensor
        name = str(reduce_op).lower().removeprefix("redoptype.")
        if name not in ("mean", "avg", "sum", "max", "min"):
            raise UserError(f"self.log with reduce_fx {name!r}: several processes reduce by mean, sum, max or min.")
        total = tensor.clone()
        collectives.all_reduce_(total, name if name in ("max", "min") else "sum")
        return total / self.world_size if name in ("mean", "avg") else total

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """The tensors of all processes, stacked."""
        if self.world_size == 1:
            return tensor
        assert not sync_grads, "gradients of several processes are summed by the optimizer"
        gathered = tensor.new_zeros(self.world_size, *tensor.shape)
        gathered[self.global_rank] = tensor
        collectives.all_reduce_(gathered)
        return gathered

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all of the processes say so, or any."""
        count = collectives.all_reduce_sum(decision)
        return count == self.world_size if all else count > 0


class FullySharded(UnwrappedDDP):
    """FSDP2: each process has a part of every weight, gradient and moment, and gathers the weights layer by layer."""

    def configure_ddp(self) -> None:
        """Shard the weights, which are whole on each process until now."""
        super().configure_ddp()
        cast(LMModule, self.lightning_module).shard_weights()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights on the main process, so that a file knows of no strategy. All processes call it."""
        assert self.lightning_module is not None
        return whole_state(self.lightning_module.state_dict())


def use_all_collectives(device: torch.device) -> None:
    """Let each collective of a step take the buffers that it keeps, before activations fill the memory."""
    ones = torch.ones(collectives.world_size(), device=device)
    part = ones.new_empty(1)
    collectives.start_reduce_scatter(part, ones).wait()
    collectives.start_all_gather(ones, part).wait()
    collectives.all_reduce_(ones)
