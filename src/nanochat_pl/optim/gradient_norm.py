"""The L2 norm of a step's summed gradient. On CPUs it has the same bits for any number of processes, but for fsdp's.

A norm of many elements depends on the order in which their squares are summed. So there it is the norm of the norms of
pieces, which never lie across the parts of two processes and are the same whoever has them; every process gets those of
the others, at their places. On GPUs, where thousands of pieces would take long to launch, a process has one piece of
each of its parts, and the last bits depend on how many processes there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat_pl.distributed import collectives
from nanochat_pl.optim.pieces import PIECE_OF_NORM, adamw_quantum
from nanochat_pl.optim.sharding import Shard


class _Part(NamedTuple):
    """This process's elements of the gradient of a parameter, or of a stack.

    Attributes:
        gradient: its elements, 1-D.
        quantum: elements that stay together: at most a piece, or the whole is a multiple of them.
        begin: place of the first element in the whole: a multiple of the quantum, if there is an element.
        total: elements of the whole.
    """

    gradient: Tensor
    quantum: int
    begin: int
    total: int


def gradient_norm(shards: Sequence[Sequence[Shard]], groups: Sequence[Mapping[str, Any]]) -> Tensor:
    """The norm of the summed gradient. All processes call it.

    Args:
        shards: of each parameter group, where there are several processes. They have the gradients.
        groups: of the optimizer. With one process their parameters have the gradients.

    Returns:
        float32, a scalar on the device, without waiting for it; the same bits on every process.
    """
    device = groups[0]["params"][0].device
    parts = _of_shards(shards) if shards else _of_groups(groups)
    if device.type == "cpu":
        return _norm_by_places(parts)
    pieces = [part.gradient for part in parts if len(part.gradient)]
    own = torch.linalg.vector_norm(_norms(pieces)) if pieces else torch.zeros((), device=device)
    if shards:
        own.square_()
        collectives.all_reduce_(own)
        own.sqrt_()
    return own


def _norm_by_places(parts: Iterable[_Part]) -> Tensor:
    pieces: list[Tensor] = []
    places: list[int] = []
    count = 0  # pieces of all processes
    for part in parts:
        width, per_quantum = min(part.quantum, PIECE_OF_NORM), -(-part.quantum // PIECE_OF_NORM)
        blocks = part.gradient.split(part.quantum) if part.quantum % width else (part.gradient,)
        own = [piece for block in blocks for piece in block.split(width) if len(piece)]
        first = count + part.begin // part.quantum * per_quantum
        pieces += own
        places += range(first, first + len(own))
        count += -(-part.total // part.quantum) * per_quantum
    norms = torch.zeros(count)
    if pieces:
        norms[torch.tensor(places)] = _norms(pieces)
    collectives.all_reduce_(norms)  # of each piece one process has the norm, the others have 0
    return torch.linalg.vector_norm(norms)


def _norms(pieces: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(pieces, 2, torch.float32))


def _of_shards(shards: Sequence[Sequence[Shard]]) -> Iterator[_Part]:
    for shard in chain.from_iterable(shards):
        assert shard.gradient is not None, "summed gradients are used up by the step"
        yield _Part(shard.gradient, shard.quantum, shard.begin, shard.total)


def _of_groups(groups: Sequence[Mapping[str, Any]]) -> Iterator[_Part]:
    for group in groups:
        for gradient in (parameter.grad.reshape(-1) for parameter in group["params"]):
            length = len(gradient)
            yield _Part(gradient, adamw_quantum(length) if group["kind"] == "adamw" else length, 0, length)
