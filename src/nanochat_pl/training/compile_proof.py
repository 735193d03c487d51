"""Whether a compiled loss runs on this machine and gives what the uncompiled one does, found out with a tiny model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from nanochat_pl.common.device import ComputeDType
from nanochat_pl.common.errors import first_line
from nanochat_pl.model.compiled import CompiledLoss
from nanochat_pl.model.config import GPTConfig, ModelSettings, num_heads, resolve_model, window_sizes
from nanochat_pl.model.fp8 import Fp8Backend
from nanochat_pl.model.gpt import GPT, TORCH_DTYPES
from nanochat_pl.training.tiny_steps import NUM_POSITIONS, NUM_ROWS, TOLERANCE, VOCABULARY, distance, rows, tiny_net

# A value at the edge between two FP8 numbers goes to the other one if its last bit of bfloat16 is another.
FP8_TOLERANCE = 0.1


def why_not_compiled(
    device: torch.device, dtype: ComputeDType, settings: ModelSettings, fp8: Fp8Backend | None = None
) -> str | None:
    """What speaks against compiling a model of these settings on a device, in a few words; None: nothing."""
    if device.type == "mps":
        return "it is not used on Apple GPUs"
    try:
        net = tiny_net(device, TORCH_DTYPES[dtype], config=config_of_its_kind(settings, dtype))
        if fp8 is not None:
            net.enable_fp8(fp8)
        far = distance_of_compiled(net)
    except Exception as error:  # whatever a missing compiler, header or library makes of it
        return f"it does not run here: {first_line(error)[:160]}"
    most = tolerance(dtype, fp8 is not None)
    return None if far <= most else f"its gradients of a tiny model are {far:.1e} off, more than {most:.0e}"


def tolerance(dtype: ComputeDType, fp8: bool = False) -> float:
    """The largest distance of compiled from uncompiled metrics, relative."""
    return FP8_TOLERANCE if fp8 else 3 * TOLERANCE[TORCH_DTYPES[dtype]]


def config_of_its_kind(settings: ModelSettings, dtype: ComputeDType) -> GPTConfig:
    """The least model of the same kind: one layer with all that a layer of the settings may have (a short window, a
    value embedding, grouped queries), and heads of their width. Each graph more takes seconds to compile."""
    grouped = settings.num_kv_heads not in (None, num_heads(settings))
    least = dataclasses.replace(
        settings,
        depth=1,
        aspect_ratio=(1 + grouped) * settings.head_dim,
        num_kv_heads=1 if grouped else None,
        sequence_len=NUM_POSITIONS,
        short_window_multiple=None,
        vocab_multiple=1,
    )
    config = resolve_model(least, VOCABULARY, dtype)
    return dataclasses.replace(config, windows=(min(window_sizes(dataclasses.replace(least, depth=settings.depth))),))


def distance_of_compiled(net: GPT) -> float:
    """Relative distance of the compiled loss of a tiny model and of its gradients from the uncompiled ones."""
    inputs, targets = (tensor.to(net.device) for tensor in rows())
    expected = loss_and_gradients(net.loss_by_row, net, inputs, targets)
    return distance(loss_and_gradients(CompiledLoss(net), net, inputs, targets), expected)


def loss_and_gradients(
    loss_by_row: Callable[..., tuple[Tensor, Tensor]], net: GPT, inputs: Tensor, targets: Tensor
) -> list[Tensor]:
    """The mean loss, and its gradients by all parameters."""
    loss = loss_by_row(inputs, targets)[0] / (NUM_ROWS * NUM_POSITIONS)
    return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]
