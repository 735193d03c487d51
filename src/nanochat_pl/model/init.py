"""First weights. The same seed gives the same numbers on every device, whatever ran before."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_pl.common.settings import setting
from nanochat_pl.model.gpt import GPT


@dataclass(frozen=True)
class InitSettings:
    """Numbers of the first weights. Linears are uniform within ±sqrt(3 / width), that is of variance 1 / width."""

    wte_std: float = setting(0.8, "Standard deviation of the token embedding.", at_least=0.0)
    lm_head_std: float = setting(0.001, "Standard deviation of the head.", at_least=0.0)
    mlp_scale: float = setting(0.4, "Factor on the first linear of the feed-forward part.", at_least=0.0)
    gate_max: float = setting(0.02, "Weights of the gates are uniform from 0 to this.", at_least=0.0)
    resid_first: float = setting(1.15, "Residual factor of the first layer …")
    resid_last: float = setting(1.05, "… falling linearly to that of the last.")
    x0_first: float = setting(0.20, "Factor on the embedding at the first layer …")
    x0_last: float = setting(0.05, "… falling linearly to that of the last.")
    smear: float = setting(0.0, "Factor of the smear.")
    backout: float = setting(0.2, "Factor of the backout.")


@torch.no_grad()
def init_weights(net: GPT, seed: int = 0, settings: InitSettings | None = None) -> GPT:
    """Fill every parameter of a materialised network.

    Each is drawn on the CPU from a generator of its own, seeded by ``seed`` and its name: neither the device, nor other
    parameters, nor the process's generators have a say.
    """
    numbers = settings or InitSettings()
    for name, parameter in net.named_parameters():
        parameter.copy_(_first_value(name, parameter, net, seed, numbers))
    return net


def _first_value(name: str, parameter: Tensor, net: GPT, seed: int, numbers: InitSettings) -> Tensor:
    value = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    generator = torch.Generator(device="cpu").manual_seed(_seed_of(seed, name))
    bound = (3 / net.config.width) ** 0.5
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if kind == "wte":
        return value.normal_(0.0, numbers.wte_std, generator=generator)
    if kind == "lm_head":
        return value.normal_(0.0, numbers.lm_head_std, generator=generator)
    if kind in ("c_q", "c_k", "c_v") or name.startswith("value_embeds."):
        return value.uniform_(-bound, bound, generator=generator)
    if kind == "c_fc":
        return value.uniform_(-numbers.mlp_scale * bound, numbers.mlp_scale * bound, generator=generator)
    if kind == "c_proj":
        return value.zero_()
    if kind in ("ve_gate", "smear_gate"):
        return value.uniform_(0.0, numbers.gate_max, generator=generator)
    return _first_factor(kind, len(value), numbers)


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
