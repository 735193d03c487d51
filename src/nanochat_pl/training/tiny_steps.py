"""The tiny model of the self-test and a few of its optimizer steps, made the same on every machine.

Weights and rows are formulas, in float64 and then rounded, so nothing depends on a random generator. No weight is zero
and no token is rare: the first updates are then no matter of rounding (the recipe's own first weights make them one).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat_pl.distributed import collectives
from nanochat_pl.model.config import GPTConfig, ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.muon_adamw import MuonAdamW
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.optim.schedules import ScheduleSettings, schedule_values

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


def take_steps(net: GPT, optimizer: MuonAdamW, steps: range) -> tuple[list[float], list[float]]:
    """Train a tiny model on the rows, of which each process takes its part.

    Returns:
        nats per target before each step, over all processes; and the norm of the summed gradients of each step.
    """
    inputs, targets = (tensor[collectives.rank() :: collectives.world_size()].to(net.device) for tensor in rows())
    losses, norms = [], []
    for step in steps:
        loss = _set_gradients(net, inputs, targets)
        collectives.all_reduce_(loss)
        losses.append(loss.item())
        norms.append(float(optimizer.reduce_gradients()))
        optimizer.set_step_values(schedule_values(SCHEDULE, step, NUM_STEPS))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def _set_gradients(net: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """This process's part of the gradients; gives its part of the mean loss. Rows may be none."""
    parameters = list(net.parameters())
    if len(inputs) == 0:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        return torch.zeros((), device=net.device)
    loss = net.weighted_loss(inputs, targets) / (NUM_ROWS * NUM_POSITIONS)
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    return loss.detach()


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Relative L2 distance of two lists of tensors."""
    a, b = (torch.cat([tensor.cpu().double().flatten() for tensor in tensors]) for tensors in (found, expected))
    return float((a - b).norm() / b.norm())
