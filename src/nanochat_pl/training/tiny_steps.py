"""The tiny model of the self-test and a few of its optimizer steps, made the same on every machine.

Weights, rows and gradients are formulas, in float64 and then rounded, so nothing depends on a random generator. No
weight is zero and no token is rare: the first updates are then no matter of rounding (the recipe's own first weights
make them one).
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat_pl.distributed import collectives
from nanochat_pl.model.config import GPTConfig, ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT, parameter_roles
from nanochat_pl.optim import MuonAdamW, OptimSettings, ScheduleSettings, build_optimizer, resolve_hyperparameters
from nanochat_pl.optim.schedules import schedule_values

# Largest distances, relative (L2). What is measured is a fifth of it or less; a product in TF32 is 3e-4 off.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
NUM_STEPS = 4
NUM_ROWS, NUM_POSITIONS, VOCABULARY = 6, 24, 40
SCHEDULE = ScheduleSettings(warmup_steps=2)
# Grouped heads, short windows, a value embedding; numbers that few numbers of processes divide.
DEPTH = 3


def tiny_config(depth: int = DEPTH) -> GPTConfig:
    """The architecture, in float32."""
    settings = ModelSettings(
        depth=depth,
        aspect_ratio=16,
        head_dim=16,
        num_kv_heads=1,
        sequence_len=NUM_POSITIONS,
        short_window_multiple=None,
    )
    return resolve_model(settings, VOCABULARY, "float32")


def tiny_net(
    device: torch.device, dtype: torch.dtype = torch.float32, depth: int = DEPTH, config: GPTConfig | None = None
) -> GPT:
    """The model (or one of another architecture) on a device, with activations of a type."""
    net = GPT(config or tiny_config(depth), compute_dtype=dtype).materialise(device)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(net.named_parameters()):
            parameter.copy_(_first_weight(name, parameter.shape, number))
    return net


def _first_weight(name: str, shape: torch.Size, number: int) -> Tensor:
    noise = pattern(shape, number)
    if name.endswith(("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda")):
        return 0.5 + 0.2 * noise
    scale = 1.0 if "wte" in name or "embeds" in name else 1.5 * shape[-1] ** -0.5
    return scale * noise


def pattern(shape: torch.Size | tuple[int, ...], number: int) -> Tensor:
    """float64 on the CPU, in (-1, 1), another for each number."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(index * (1.3 + 0.01 * number) + index.square() * 0.37 + number).reshape(shape)


def rows() -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step, int64 (NUM_ROWS, NUM_POSITIONS): a text with something to learn in it."""
    place = torch.arange(NUM_ROWS * (NUM_POSITIONS + 1)).view(NUM_ROWS, -1)
    ids = (place * place * 3 + place * 7) % VOCABULARY
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def tiny_optimizer(net: GPT) -> MuonAdamW:
    """The recipe's optimizer at its usual learning rates."""
    hyper = resolve_hyperparameters(OptimSettings(), width=net.config.width)
    return build_optimizer(net.named_parameters(), parameter_roles(net), hyper)


@dataclass
class Steps:
    """What a few steps came to.

    Attributes:
        losses: nats per target before each step, over all processes.
        norms: of the summed gradients of each step.
        changes: of every parameter by the first step, on the CPU.
        weights: of every parameter in the end, on the CPU.
    """

    losses: list[float]
    norms: list[float]
    changes: list[Tensor]
    weights: list[Tensor]


def take_steps(net: GPT) -> Steps:
    """Train a tiny model on the rows, which the processes share among them."""
    inputs, targets = (tensor[collectives.rank() :: collectives.world_size()].to(net.device) for tensor in rows())
    optimizer, before = tiny_optimizer(net), on_cpu(net.parameters())
    steps = Steps([], [], [], [])
    for step in range(NUM_STEPS):
        loss = set_gradients(net, inputs, targets)
        collectives.all_reduce_(loss)
        steps.losses.append(loss.item())
        steps.norms.append(update(optimizer, step))
        if step == 0:
            steps.changes = [new - old for new, old in zip(on_cpu(net.parameters()), before, strict=True)]
    steps.weights = on_cpu(net.parameters())
    return steps


def set_gradients(net: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """This process's share of the gradients; gives its share of the mean loss. Rows may be none."""
    parameters = list(net.parameters())
    if len(inputs) == 0:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        return torch.zeros((), device=net.device)
    loss = net.weighted_loss(inputs, targets) / (NUM_ROWS * NUM_POSITIONS)
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    return loss.detach()


def update(optimizer: MuonAdamW, step: int) -> float:
    """Sum the gradients over the processes and step; gives the norm of the sum."""
    norm = float(optimizer.reduce_gradients())
    optimizer.set_step_values(schedule_values(SCHEDULE, step, NUM_STEPS))
    optimizer.step()
    optimizer.zero_grad()
    return norm


def give_gradients(net: GPT, step: int, shares: range) -> None:
    """Gradients by formula, the sum of these shares. Each share has a direction of its own, so none may be lost."""
    for number, parameter in enumerate(net.parameters()):
        terms = (pattern(parameter.shape, 1000 * (share + 1) + 100 * step + number) for share in shares)
        gradient = torch.zeros(parameter.shape, dtype=torch.float64)
        for term in terms:
            gradient += term
        parameter.grad = gradient.to(parameter)


def take_given_steps(net: GPT, optimizer: MuonAdamW, shares: range, steps: range) -> list[float]:
    """Updates by given gradients; gives the norms of their sums."""
    norms = []
    for step in steps:
        give_gradients(net, step, shares)
        norms.append(update(optimizer, step))
    return norms


def on_cpu(tensors: Iterator[torch.nn.Parameter]) -> list[Tensor]:
    """Copies, float32 on the CPU."""
    return [copy.deepcopy(tensor.detach().float().cpu()) for tensor in tensors]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Relative L2 distance of two lists of tensors."""
    a, b = (torch.cat([tensor.cpu().double().flatten() for tensor in tensors]) for tensors in (found, expected))
    return float((a - b).norm() / b.norm())


# What one process on the CPU makes of it: another program, since the processes of this one speak to each other.


@dataclass
class Alone:
    """Steps on the rows; norms of given gradients in some number of shares, and the change of the weights by them."""

    steps: Steps
    norms: list[float]
    changes: list[Tensor]


def make_alone(num_shares: int) -> Alone:
    """Compute it, in the one process that this must be."""
    assert collectives.world_size() == 1, "this is what many processes are held against"
    cpu = torch.device("cpu")
    steps, net = take_steps(tiny_net(cpu)), tiny_net(cpu)
    before = on_cpu(net.parameters())
    norms = take_given_steps(net, tiny_optimizer(net), range(num_shares), range(NUM_STEPS))
    changes = [new - old for new, old in zip(on_cpu(net.parameters()), before, strict=True)]
    return Alone(steps, norms, changes)


def start_alone(num_shares: int, path: Path) -> subprocess.Popen[str]:
    """Begin to compute it in a program of its own, which writes it to ``path``."""
    launch = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(launch)}
    command = [sys.executable, "-m", "nanochat_pl.training.tiny_steps", str(num_shares), str(path)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def read_alone(child: subprocess.Popen[str], path: Path) -> Alone:
    """Wait for it."""
    _, said = child.communicate()
    if child.returncode != 0:
        raise RuntimeError(f"the process on the CPU ended with code {child.returncode}: {said.strip()[-300:]}")
    tensors = load_file(path)
    lists: dict[str, list[Tensor]] = {"changes": [], "weights": [], "given": []}
    for name in sorted(tensors, key=lambda name: int(name.partition(".")[2])):
        lists[name.partition(".")[0]].append(tensors[name])
    with safe_open(path, "pt") as file:
        figures = json.loads(file.metadata()["figures"])
    steps = Steps(figures["losses"], figures["norms"], lists["changes"], lists["weights"])
    return Alone(steps, figures["given"], lists["given"])


def _write_alone(alone: Alone, path: Path) -> None:
    steps = alone.steps
    lists = {"changes": steps.changes, "weights": steps.weights, "given": alone.changes}
    tensors = {f"{name}.{number}": tensor for name, tensors in lists.items() for number, tensor in enumerate(tensors)}
    figures = json.dumps({"losses": steps.losses, "norms": steps.norms, "given": alone.norms})
    save_file(tensors, path, {"figures": figures})


if __name__ == "__main__":
    torch.set_num_threads(1)
    _write_alone(make_alone(int(sys.argv[1])), Path(sys.argv[2]))
