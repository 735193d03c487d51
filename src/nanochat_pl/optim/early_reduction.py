"""Sums of gradients over processes that begin in the backward: that of a shard when its last gradient is complete.

Processes must begin collectives in one order, and gradients may be complete in another one on each. So the first step
records the order on the main process, and later steps begin the sums in that order, as far as all gradients before are
complete. What is left when the backward has ended begins then.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nanochat_pl.distributed import collectives
from nanochat_pl.distributed.collectives import Pending
from nanochat_pl.optim.sharding import Shard


class EarlyReduction:
    """Begins the sums of a step in its last backward.

    Args:
        shards: of all groups, in the same order on all processes.

    Attributes:
        pending: sums under way, in the order in which they were begun.
        missing: names of parameters that had no gradient when their sum began.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._order: list[int] | None = None  # of the shards; None until a step has recorded it
        self._complete: list[int] = []  # shards whose gradients are complete, as they came
        self._awaited: list[int] | None = None  # gradients that each shard still waits for; None: nothing was recorded
        self.pending: list[Pending] = []
        self.missing: list[str] = []

    @contextmanager
    def reducing(self) -> Iterator[None]:
        """Around the last backward of a step. The sums of all shards are under way after it, except in the first step.

        All processes enter it, and leave it without an exception: also one whose backward ran out of memory, as the
        others have begun their sums. It then gives zeros for the gradients that it lacks.
        """
        self._complete, self.missing = [], []
        self._awaited = [len(shard.parameters) for shard in self._shards]
        handles = [
            parameter.register_post_accumulate_grad_hook(functools.partial(self._on_gradient, number))
            for number, shard in enumerate(self._shards)
            for parameter in shard.parameters
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if self._order is not None:
            self._begin_rest(self._order)

    def agree_on_order(self) -> None:
        """After a step that recorded it: the order of the steps to come. All processes call it."""
        if self._order is None and self._awaited is not None:
            rest = [number for number in range(len(self._shards)) if number not in self._complete]
            self._order = json.loads(collectives.broadcast_str(json.dumps(self._complete + rest)))

    def wait(self) -> None:
        """Wait for what is under way."""
        for each in self.pending:
            each.wait()
        self.pending = []

    def _on_gradient(self, number: int, parameter: Tensor) -> None:
        """Autograd calls it, in a thread of its own on GPUs, when a parameter of a shard has its gradient."""
        assert self._awaited is not None
        self._awaited[number] -= 1
        assert self._awaited[number] >= 0, "a parameter got two gradients in one backward"
        if self._awaited[number]:
            return
        self._complete.append(number)
        if self._order is not None:
            for following in self._order[len(self.pending) :]:
                if self._awaited[following]:
                    return
                self._begin(following)

    @torch.no_grad()
    def _begin(self, number: int) -> None:
        self.pending.append(self._shards[number].start_reduce())

    def _begin_rest(self, order: Sequence[int]) -> None:
        for number in order[len(self.pending) :]:
            shard = self._shards[number]
            for name, parameter in zip(shard.names, shard.parameters, strict=True):
                if parameter.grad is None:
                    self.missing.append(name)
                    parameter.grad = torch.zeros_like(parameter)
            self._begin(number)
