"""The loss of a training step, compiled part by part: what goes into the layers, one kind of layer, the end.

Layers of a kind (window, with value embedding or without) are the same function of other tensors, so one graph serves
all of them. Compile time then does not grow with the depth, and a step with other shapes compiles few graphs again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from nanochat_pl.common.compiling import twin
from nanochat_pl.model.attention import Case, choose
from nanochat_pl.model.gpt import GPT, Step, run_layer, run_layer_again

R = TypeVar("R")


class CompiledLoss:
    """:meth:`GPT.loss_by_row` with gradients, compiled. The network itself, which it only refers to, stays eager."""

    def __init__(self, net: GPT) -> None:
        self._net = net
        config, documents = net.config, net.config.document_start_id is not None
        for window in {*config.windows}:
            # Backends are tried now, and not while a graph is made.
            case = Case(net.compute_dtype, window, config.sequence_len, config.head_dim, documents, compiled=True)
            choose(net.device, case, net.attention)
        self._begin, self._end = _compiled(_begin), _compiled(_end)
        run = run_layer_again if net.activation_checkpointing else run_layer
        kinds = [(window, net.value_embedding(layer) is None) for layer, window in enumerate(net.config.windows)]
        of_kind = {kind: _compiled(run) for kind in kinds}
        self._layers: list[Callable[..., Tensor]] = [of_kind[kind] for kind in kinds]

    def __call__(self, ids: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Arguments and result as of :meth:`GPT.loss_by_row`."""
        return self.by_token(ids, targets, weights)[:2]

    def by_token(self, ids: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments and result as of :meth:`GPT.loss_by_token`."""
        net = self._net
        step = net.packed(ids)
        first = self._begin(net, ids, step)
        # Another tensor object: to the compiler a layer that is given one tensor twice is of a kind of its own.
        x, middle = net.through_layers(self._layers, first.view_as(first), first, ids, step)
        return self._end(net, x, middle, targets, weights)


def _compiled(function: Callable[..., R]) -> Callable[..., R]:
    return torch.compile(twin(function), dynamic=False)


def _begin(net: GPT, ids: Tensor, step: Step | None) -> Tensor:
    return net.begin(ids, step)


def _end(net: GPT, x: Tensor, middle: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if weights is None:
        weights = torch.ones_like(targets, dtype=torch.float32)
    return net.loss_of_hidden(net.end(x, middle), targets, weights)
