"""ZeRO-1: one rank's shard of a parameter group, with its gradients, moments and updates.

The parameters' elements are laid end to end and cut into one part per process. All parts are equally long, as
reduce-scatter and all-gather want it: what the last parts have beyond the parameters is filled up with zeros, in what
is sent only. With more processes than parts are needed for, some have nothing: the last ones, or the first where the
parameters are laid to the end. Cuts lie at multiples of ``quantum`` elements:

- a stack of matrices: at whole matrices, since each is orthogonalized as a whole;
- one parameter of AdamW: at multiples of :func:`~nanochat_pl.optim.pieces.adamw_quantum`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from nanochat_pl.distributed import collectives
from nanochat_pl.distributed.collectives import Pending

Shape = tuple[int, ...]


def moment_shapes(kind: str, shape: Shape) -> dict[str, Shape]:
    """The moments of a parameter and their shapes."""
    if kind == "adamw":
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    rows, columns = shape
    return {"momentum": shape, "second_moment": (rows, 1) if rows >= columns else (1, columns)}


class Shard:
    """The part that process ``rank`` of ``world_size`` has of ``parameters``.

    Args:
        names, parameters: laid end to end in this order; of one shape, dtype and device.
        quantum: elements that stay together: of a stack those of a matrix.
        at_end: whether processes that get nothing are the first ones.

    Attributes:
        total: elements of the parameters, without filling.
        part: elements of each process's part, filling included.
        before: of filling before the first parameter, a multiple of ``part``.
        begin, end: this process's elements among all, without filling.
        moments: this process's optimizer state by name, without filling, 1-D; a scalar is the same on every process.
        gradient: (end - begin,) its part of the summed gradient, from :meth:`start_reduce` until it is used up.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        quantum: int,
        rank: int,
        world_size: int,
        at_end: bool = False,
    ) -> None:
        self.names, self.parameters, self.rank, self.world_size = names, parameters, rank, world_size
        self.quantum = quantum
        self.total = sum(parameter.numel() for parameter in parameters)
        self.part = -(-self.total // (quantum * world_size)) * quantum
        self.before = (world_size - -(-self.total // self.part)) * self.part if at_end else 0
        self.begin, self.end = (min(max(place * self.part - self.before, 0), self.total) for place in (rank, rank + 1))
        self.moments: dict[str, Tensor] = {}
        self.gradient: Tensor | None = None
        self._gathered: Tensor | None = None

    def allocate(self, shapes: Mapping[str, Shape]) -> None:
        """Allocate this process's moments, zeros.

        Args:
            shapes: of each moment, as a whole parameter has it.
        """
        first = self.parameters[0]
        for moment, shape in shapes.items():
            length = (self.end - self.begin) * prod(shape) // first.numel()
            self.moments[moment] = torch.zeros(length if shape else (), device=first.device)

    def own_values(self) -> Tensor:
        """A float32 copy of this process's elements of the parameters, 1-D."""
        pieces = [
            parameter.detach().reshape(-1)[self._places(i, self.rank, parameter.shape)[0]]
            for i, parameter in enumerate(self.parameters)
        ]
        return torch.cat(pieces).float()

    def start_reduce(self) -> Pending:
        """Begin to sum the gradients over all processes. They are taken from the parameters."""
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        given = [gradient for gradient in gradients if gradient is not None]
        inputs = self._filled(given, self.part * self.world_size, self.before)
        output = inputs.new_empty(self.part)
        self.gradient = output[: self.end - self.begin]
        return collectives.start_reduce_scatter(output, inputs)

    def take_gradient(self) -> Tensor:
        """The summed gradient in float32, given up here."""
        assert self.gradient is not None
        gradient, self.gradient = self.gradient, None
        return gradient.float()

    def start_gather(self, own: Tensor) -> Pending:
        """Begin to put the updated parameters together from all processes' parts.

        Args:
            own: the updated elements of this process, in any shape.
        """
        first = self.parameters[0]
        length = self.part * self.world_size
        if len(self.parameters) == 1 and self.total == length and first.is_contiguous():
            output = first.detach().view(-1)
        else:
            output = self._gathered = first.new_empty(length)
        return collectives.start_all_gather(output, self._filled([own.to(first.dtype)], self.part))

    def finish_gather(self) -> None:
        """Take over the parameters that have arrived."""
        if self._gathered is not None:
            whole = self._gathered[self.before : self.before + self.total]
            pieces = whole.split([parameter.numel() for parameter in self.parameters])
            values = [piece.view_as(parameter) for piece, parameter in zip(pieces, self.parameters, strict=True)]
            torch._foreach_copy_(list(self.parameters), values)
            self._gathered = None

    def gather_moment(self, i: int, moment: str, shape: tuple[int, ...]) -> Tensor | None:
        """A moment of parameter ``i`` put together on the CPU of process 0; None on the others. Called on all.

        Args:
            shape: of the moment of the whole parameter.
        """
        own = self.moments[moment]
        whole = torch.empty(shape, dtype=own.dtype) if self.rank == 0 else None
        for rank in range(self.world_size if shape else 1):  # a scalar: what process 0 has
            there, _ = self._places(i, rank, shape)
            if there.start == there.stop:
                continue
            if whole is None:  # the others' parts are not sent here
                if rank == self.rank:
                    collectives.send(self.own_moment(i, moment, shape), 0)
                continue
            if rank == 0:
                piece = self.own_moment(i, moment, shape)
            else:
                collectives.receive_(piece := own.new_empty(there.stop - there.start), rank)
            whole.view(-1)[there] = piece.cpu()
        return whole

    def load_moment(self, i: int, moment: str, whole: Tensor) -> None:
        """Take this process's part of a moment of parameter ``i``: nothing else of it is read."""
        there, _ = self._places(i, self.rank, whole.shape)
        self.own_moment(i, moment, whole.shape).copy_(whole.reshape(-1)[there])

    def own_moment(self, i: int, moment: str, shape: Sequence[int]) -> Tensor:
        """This process's part of a moment of parameter ``i``, 1-D, maybe empty."""
        return self.moments[moment].view(-1)[self._places(i, self.rank, shape)[1]]

    def _places(self, i: int, rank: int, shape: Sequence[int]) -> tuple[slice, slice]:
        """Where the elements that a process has of a moment lie: in the whole one of parameter ``i``, in its own."""
        if not shape:
            return slice(0, 1), slice(0, 1)
        numel, wanted = self.parameters[i].numel(), prod(shape)
        start, offset = i * numel, rank * self.part - self.before
        begin, end = (min(max(place - start, 0), numel) for place in (offset, offset + self.part))
        begin, end, shift = (number * wanted // numel for number in (begin, end, start - offset))
        return slice(begin, end), slice(begin + shift, end + shift)

    def _filled(self, tensors: Sequence[Tensor], length: int, before: int = 0) -> Tensor:
        """Tensors laid end to end and filled up with zeros; a single one of that length is given back itself."""
        flat = [tensor.reshape(-1) for tensor in tensors]
        missing = length - sum(map(len, flat))
        if len(flat) == 1 and not missing:
            return flat[0]
        return torch.cat([flat[0].new_zeros(before), *flat, flat[0].new_zeros(missing - before)])
