"""A network whose weights, gradients and moments are sharded over the processes: PyTorch's FSDP2.

Each block and each embedding is gathered for its own forward and backward; the head and the few numbers between the
blocks are gathered for the whole of them. Weights are kept in float32 and cast where they are used, as ever, so nothing
of FSDP2's mixed precision is wanted: with it rotary tables would be cast too.

What is not training (validation, samples, benchmarks, resume files, bundles) takes the whole weights: a copy that each
process gathers, or the main one, tensor by tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from nanochat_pl.common.compiling import twin
from nanochat_pl.distributed import collectives
from nanochat_pl.model.gpt import GPT, Block
from nanochat_pl.optim.fully_sharded import is_sharded


def fully_shard_net(net: GPT, device: torch.device, compiled: bool = False) -> None:
    """Shard the weights of a network in place over all processes; all have the same. Its losses then gather them.

    Gradients are summed over the processes in the backward of each micro-batch.

    Args:
        compiled: compile the forward of the blocks, one graph for each kind. What gathers and drops weights stays
            outside of it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (collectives.world_size(),))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    # Embeddings by themselves: a group has one type, and theirs may be bfloat16.
    parts = [net.transformer["wte"], *net.value_embeds.values(), *net.blocks]
    for part in parts:
        fully_shard(cast(nn.Module, part), mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(net, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for part in (*parts, net):
        sharded = cast(FSDPModule, part)
        # Sums, not means: the loss is divided by the targets of all processes already.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(net, "loss_by_row")
    if compiled:
        _compile_blocks(net)


def _compile_blocks(net: GPT) -> None:
    kinds = [(window, net.value_embedding(layer) is None) for layer, window in enumerate(net.config.windows)]
    of_kind = {kind: torch.compile(twin(Block.forward), dynamic=False) for kind in kinds}
    for block, kind in zip(net.blocks, kinds, strict=True):
        block.forward = functools.partial(of_kind[kind], cast(Block, block))


def whole_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with whole tensors on the CPU of the main process; empty on the others. All call it.

    No process holds more than one whole tensor besides, and the tensors share no memory with those of the training.
    """
    whole = {}
    for name, value in state.items():
        gathered = _whole(value) if isinstance(value, Tensor) else value
        if collectives.is_rank_zero():
            is_copy = is_sharded(value)
            whole[name] = gathered.to("cpu", copy=not is_copy) if isinstance(gathered, Tensor) else gathered
        del gathered
    return whole


@torch.no_grad()
def whole_copy(net: GPT) -> GPT:
    """A network with the weights of now, whole on each process. All call it."""
    copy = GPT(
        net.config, net.compute_dtype, loss_chunk_tokens=net.loss_chunk_tokens, attention=net.attention
    ).materialise(net.device)
    weights = dict(net.named_parameters())
    for name, parameter in copy.named_parameters():
        parameter.copy_(_whole(weights[name]))
    return copy


def _whole(tensor: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, tensor.detach()).full_tensor()) if is_sharded(tensor) else tensor.detach()


class ShardedWeights:
    """The part of a module that knows of sharded weights.

    Attributes:
        is_sharded: whether each process has a part of the weights only.
    """

    is_sharded = False
    net: GPT | None
    config: Any

    def shard_weights(self) -> None:
        """Keep a part of the weights on each process from now on (FSDP2). All processes call it, before training."""
        assert self.net is not None
        fully_shard_net(self.net, self.net.device, self.config.compile)
        self._loss = (self.net.loss_by_row,)  # the one that gathers weights
        self.is_sharded = True

    def whole_net(self) -> GPT:
        """The network with all of its weights, for what is not training: where they are sharded a copy of now.

        All processes call it.
        """
        assert self.net is not None
        return whole_copy(self.net) if self.is_sharded else self.net
