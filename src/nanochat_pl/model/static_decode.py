"""The forward of a decode step of fixed structure, for a compiler (see :mod:`~nanochat_pl.model.compiled_decode`) or a
CUDA graph (:mod:`~nanochat_pl.model.graph_decode`).

Shapes as in :mod:`~nanochat_pl.model.decode_step`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nanochat_pl.model.decode_step import DecodeStep
from nanochat_pl.model.gpt import run_layer
from nanochat_pl.model.inference import InferenceGPT


class DecodeInputs(NamedTuple):
    """What a step is given.

    Attributes:
        ids, before, positions: int64 (B,): the new tokens, those before them, and the positions of the new ones.
        ends: int64 (B,) of each window.
        cached: keys, then values, of each layer, (B, G, K, D) each.
    """

    ids: Tensor
    before: Tensor
    positions: Tensor
    ends: list[Tensor]
    cached: list[Tensor]


def decode(net: InferenceGPT, inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
    """Logits, float32 (B, V), and new keys and values, (B, 2 · layers, G, D)."""
    windows = net.config.windows
    ends = dict(zip(sorted(set(windows)), inputs.ends, strict=True))
    cached = list(zip(inputs.cached[::2], inputs.cached[1::2], strict=True))
    ids = inputs.ids[:, None]
    step = DecodeStep(net.embed(inputs.before[:, None]), inputs.positions[:, None], cached, ends)
    first = net.begin(ids, step)
    x = net.end(*net.through_layers([run_layer] * len(windows), first, first, ids, step))
    return net.head(x[:, 0]), torch.stack(step.new, dim=1)
