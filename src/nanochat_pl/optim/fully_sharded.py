"""What a rank has of parameters that FSDP2 keeps sharded: rows of every parameter, and for Muon whole matrices.

``fully_shard`` cuts each parameter along its first dimension, ceil(rows / processes) to each, and sums gradients in the
backward. AdamW updates those rows where they lie, without a word to the other processes. Muon orthogonalizes whole
matrices, never a shard of one: an all-to-all brings the rows of gradients and weights to the owner of each matrix, who
has its moments too, and another one takes the updated rows back.

Moments are saved, loaded and owned as in :mod:`nanochat_pl.optim.sharding`, so state is the same for any strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from nanochat_pl.distributed import collectives
from nanochat_pl.optim.pieces import ALIGNMENT, adamw_quantum
from nanochat_pl.optim.sharding import Shard


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process has some rows of a tensor (a DTensor), and not all of it."""
    return hasattr(tensor, "to_local")


def own_rows(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that this process has, maybe none; sharing its memory."""
    return cast(Tensor, cast(Any, tensor).to_local())


class _Done:
    """What is under way and needs no other process, or is finished by a function once it has arrived."""

    def __init__(self, pending: collectives.Pending | None = None, finish: Callable[[], None] = lambda: None) -> None:
        self._pending, self._finish = pending, finish

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.wait()
        self._finish()


class RowShard(Shard):
    """This process's rows of one parameter of AdamW."""

    def __init__(self, name: str, parameter: Tensor, rank: int, world_size: int) -> None:
        super().__init__([name], [parameter], parameter.numel() // parameter.size(0), rank, world_size)
        assert own_rows(parameter).numel() == self.end - self.begin, name

    def own_values(self) -> Tensor:
        return own_rows(self.parameters[0]).detach().reshape(-1).float()

    def start_reduce(self) -> _Done:  # type: ignore[override]
        (parameter,) = self.parameters
        assert parameter.grad is not None
        self.gradient, parameter.grad = own_rows(parameter.grad).reshape(-1), None
        return _Done()

    def start_gather(self, own: Tensor) -> _Done:  # type: ignore[override]
        own_rows(self.parameters[0]).detach().view(-1).copy_(own.view(-1))
        return _Done()


class StackShard(Shard):
    """This process's matrices of a stack for Muon, of which it keeps some rows of each."""

    def __init__(
        self, names: Sequence[str], parameters: Sequence[Tensor], rank: int, world_size: int, at_end: bool
    ) -> None:
        super().__init__(names, parameters, parameters[0].numel(), rank, world_size, at_end)
        num_rows = parameters[0].size(0)
        each = -(-num_rows // world_size)
        self._rows = [min(each, max(num_rows - place * each, 0)) for place in range(world_size)]
        counts = [self._num_matrices(place) for place in range(world_size)]
        width = parameters[0].numel() // num_rows
        # Elements that go to each process, and come from it, where rows are brought to the owners.
        self._sent = [count * self._rows[rank] * width for count in counts]
        self._received = [counts[rank] * rows * width for rows in self._rows]

    def _num_matrices(self, rank: int) -> int:
        places = (min(max(place * self.part - self.before, 0), self.total) for place in (rank, rank + 1))
        begin, end = places
        return (end - begin) // self.parameters[0].numel()

    def own_values(self) -> Tensor:
        pending, received = self._start_to_owners([own_rows(each).detach() for each in self.parameters])
        pending.wait()
        return self._matrices(received).reshape(-1).float()

    def start_reduce(self) -> _Done:  # type: ignore[override]
        gradients = [own_rows(each.grad) for each in self.parameters if each.grad is not None]
        for parameter in self.parameters:
            parameter.grad = None
        pending, received = self._start_to_owners(gradients)

        def finish() -> None:
            self.gradient = self._matrices(received).reshape(-1)

        return _Done(pending, finish)

    def start_gather(self, own: Tensor) -> _Done:  # type: ignore[override]
        first = own_rows(self.parameters[0]).detach()
        matrices = own.to(first.dtype).view(-1, *self.parameters[0].shape)
        inputs = torch.cat([rows.reshape(-1) for rows in matrices.split(self._rows, dim=1)])
        output = inputs.new_empty(sum(self._sent))

        def finish() -> None:
            rows = output.view(len(self.parameters), *first.shape).unbind()
            torch._foreach_copy_([own_rows(each).detach() for each in self.parameters], list(rows))

        return _Done(collectives.start_all_to_all(output, inputs, self._sent, self._received), finish)

    def _start_to_owners(self, rows: Sequence[Tensor]) -> tuple[collectives.Pending, Tensor]:
        """Begin to bring the rows of all matrices to their owners, who come in the order of the matrices."""
        inputs = torch.cat([each.reshape(-1) for each in rows])
        output = inputs.new_empty(sum(self._received))
        return collectives.start_all_to_all(output, inputs, self._received, self._sent), output

    def _matrices(self, received: Tensor) -> Tensor:
        """Own matrices (K, M, N) of what has come from each process."""
        width = self.parameters[0].shape[1:]
        pieces = received.split(self._received)
        count = self._num_matrices(self.rank)
        return torch.cat(
            [piece.view(count, rows, *width) for piece, rows in zip(pieces, self._rows, strict=True)], dim=1
        )


def make_shards(kind: str, names: Sequence[str], parameters: Sequence[Tensor], at_end: bool) -> list[Shard]:
    """What this process has of a group: one shard of a stack for Muon, else one of each parameter.

    Args:
        kind: ``muon`` or ``adamw``.
        parameters: whole or sharded on each process, all alike.
        at_end: of :class:`Shard`, for a stack.
    """
    place, sharded = (collectives.rank(), collectives.world_size()), is_sharded(parameters[0])
    if kind == "muon" and sharded:
        return [StackShard(names, parameters, *place, at_end)]
    if kind == "muon":
        return [Shard(names, parameters, parameters[0].numel(), *place, at_end)]
    named = zip(names, parameters, strict=True)
    if sharded:
        return [RowShard(name, parameter, *place) for name, parameter in named]
    # Only on CPUs is the norm made of pieces; with smaller parts more parameters can be divided without filling.
    on_cpu = parameters[0].device.type == "cpu"
    return [
        Shard([name], [parameter], adamw_quantum(parameter.numel()) if on_cpu else ALIGNMENT, *place)
        for name, parameter in named
    ]
