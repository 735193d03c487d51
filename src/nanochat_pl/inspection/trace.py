"""One forward with what happens inside of it: the residual stream, attention weights, gates, and the logit lens.

Shapes: T positions, C model width, H query heads, G key/value heads, L layers, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_pl.common.errors import UserError
from nanochat_pl.model.attention import band_mask
from nanochat_pl.model.gpt import GPT, Step, run_layer
from nanochat_pl.model.layers import norm

MAX_TOKENS = 512  # attention weights of all heads are kept, T × T each


@dataclass(frozen=True)
class Trace:
    """What a forward of one row computed, float32 on the CPU.

    Attributes:
        ids: the row's T tokens.
        residuals: (L + 1, T, C): the residual stream before the first layer and after each one.
        attention: of each layer (H, T, T): how much of each position (last) goes to each position (second); 0 for later
            positions and those outside of the layer's window.
        gates: by layer (T, G): factors on the value embedding, where there is one.
    """

    ids: list[int]
    residuals: Tensor
    attention: list[Tensor]
    gates: dict[int, Tensor]


class _Recorder:
    """Attention of a whole row that keeps its weights: what a forward may go over, as a prefix tree is."""

    def __init__(self, num_tokens: int) -> None:
        self.positions = slice(num_tokens)
        self.weights: list[Tensor] = []

    def previous(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 1, -1))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
        length, group = q.size(2), q.size(1) // k.size(1)
        keys, values = (each.repeat_interleave(group, dim=1) for each in (k, v))
        scores = (q @ keys.transpose(2, 3)).float() * scale
        weights = scores.masked_fill(~band_mask(length, length, 0, window, q.device), -torch.inf).softmax(dim=-1)
        self.weights.append(weights[0].cpu())
        return weights.to(v.dtype) @ values


@torch.inference_mode()
def trace(net: GPT, ids: Sequence[int]) -> Trace:
    """Run the model over one row and keep what happens inside.

    Args:
        net: in any compute type, on any device.
        ids: 1 … ``MAX_TOKENS`` tokens, bos first.

    Raises:
        UserError: there are none, too many, or some that the model lacks.
    """
    if not 0 < len(ids) <= MAX_TOKENS:
        raise UserError(f"{len(ids):,} tokens: a trace takes 1 to {MAX_TOKENS}.")
    if not 0 <= min(ids) <= max(ids) < net.config.vocab_size:
        raise UserError(f"ids: must be 0 … {net.config.vocab_size - 1:,}, the model's vocabulary.")
    recorder, row = _Recorder(len(ids)), torch.tensor([list(ids)], device=net.device)
    step = cast(Step, recorder)
    first = net.begin(row, step)
    residuals = [first]

    def run(*arguments: Any) -> Tensor:
        residuals.append(run_layer(*arguments))
        return residuals[-1]

    runs: list[Callable[..., Tensor]] = [run] * net.config.num_layers
    with _recorded_gates(net) as gates:
        net.through_layers(runs, first, first, row, step)
    return Trace(list(ids), torch.cat(residuals).float().cpu(), recorder.weights, gates)


@contextlib.contextmanager
def _recorded_gates(net: GPT) -> Iterator[dict[int, Tensor]]:
    """The factors on the value embeddings of each layer that has one, as they are computed."""
    gates: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            gates[layer] = net.config.value_gate_scale * output[0].float().sigmoid().cpu()

        return hook

    with contextlib.ExitStack() as stack:
        for layer in net.config.value_embedding_layers:
            handle = net.blocks[layer].attn.ve_gate.register_forward_hook(keep(layer))  # type: ignore[union-attr]
            stack.callback(handle.remove)
        yield gates


@torch.inference_mode()
def logit_lens(net: GPT, traced: Trace, top: int = 1) -> tuple[Tensor, Tensor]:
    """What the head would predict from the residual stream before the first layer and after each one.

    After the middle layer its residual is taken off first, as the model does at its end (``backout_lambda``); so the
    last row is the model's own prediction.

    Returns:
        ids int64 and probabilities float32, both (L + 1, T, top), the most likely first.
    """
    middle_layer = net.config.num_layers // 2 + 1
    streams = traced.residuals.to(net.device, net.compute_dtype)
    ids, probabilities = [], []
    for layer, stream in enumerate(streams):
        hidden = net.end(stream, streams[middle_layer]) if layer >= middle_layer else norm(stream)
        best = net.head(hidden).softmax(dim=-1).topk(top, dim=-1)
        ids.append(best.indices.cpu())
        probabilities.append(best.values.cpu())
    return torch.stack(ids), torch.stack(probabilities)
