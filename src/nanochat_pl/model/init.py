"""First weights. The same seed gives the same numbers on every device, whatever ran before."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from nanochat_pl.model.config import InitSettings
from nanochat_pl.model.gpt import GPT


@torch.no_grad()
def init_weights(net: GPT, seed: int = 0, settings: InitSettings | None = None) -> GPT:
    """Fill every parameter of a materialised network.

    Each is drawn on the CPU from a generator of its own, seeded by ``seed`` and its name: neither the device, nor other
    parameters, nor the process's generators change it.
    """
    numbers = settings or InitSettings()
    for name, parameter in net.named_parameters():
        parameter.copy_(_first_value(name, parameter, net, seed, numbers))
    return net


def _first_value(name: str, parameter: Tensor, net: GPT, seed: int, numbers: InitSettings) -> Tensor:
    value = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    generator = torch.Generator(device="cpu").manual_seed(_seed_of(seed, name))
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if kind == "wte":
        return value.normal_(0.0, numbers.wte_std, generator=generator)
    if kind == "lm_head":
        return value.normal_(0.0, numbers.lm_head_std, generator=generator)
    if kind == "c_proj":
        return value.zero_()
    if kind in ("ve_gate", "smear_gate"):
        return value.uniform_(0.0, numbers.gate_max, generator=generator)
    num_outputs = net.config.num_kv_heads * net.config.head_dim if name.startswith("value_embeds.") else len(value)
    if kind in ("c_q", "c_k", "c_v", "c_fc") or name.startswith("value_embeds."):
        scale = numbers.mlp_scale if kind == "c_fc" else 1.0
        return _first_linear(value, num_outputs, net.config.width, scale, numbers, generator)
    return _first_factor(kind, len(value), numbers)


def _first_linear(
    value: Tensor, num_outputs: int, num_inputs: int, scale: float, numbers: InitSettings, generator: torch.Generator
) -> Tensor:
    if numbers.linears == "uniform":
        bound = scale * math.sqrt(3 / num_inputs)
        return value.uniform_(-bound, bound, generator=generator)
    std = scale * min(1.0, math.sqrt(num_outputs / num_inputs)) / math.sqrt(num_inputs)
    return value.normal_(0.0, std, generator=generator)


def _first_factor(kind: str, count: int, numbers: InitSettings) -> Tensor:
    first, last = {
        "resid_lambdas": (numbers.resid_first, numbers.resid_last),
        "x0_lambdas": (numbers.x0_first, numbers.x0_last),
        "smear_lambda": (numbers.smear, numbers.smear),
        "backout_lambda": (numbers.backout, numbers.backout),
    }[kind]
    return torch.tensor([first + (last - first) * i / max(count - 1, 1) for i in range(count)], dtype=torch.float32)


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
