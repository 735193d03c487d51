"""The small training that all metrics of this folder come from: the same text and weights on every machine.

Twenty steps of THE training step with MuonAdamW on rows of an invented language: no file and no network is needed, and
nothing depends on the version of Python. B rows of a batch, T positions, V vocabulary.
"""

from __future__ import annotations

import functools
import random
from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from nanochat_pl.data.batch import StepBatch, micro_batches
from nanochat_pl.model.config import DType, GPTConfig, ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT, TORCH_DTYPES
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.muon_adamw import MuonAdamW
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.optim.schedules import ScheduleSettings, schedule_values
from tests.helpers.training import BareModule

NUM_STEPS = 20
SEEDS = (0, 1, 2, 3, 4)
VOCAB_SIZE = 1000
ROWS_PER_STEP, DEVICE_BATCH_SIZE = 4, 2
# Windows of 128 and 256, grouped queries, a padded vocabulary: all that the current generation has.
MODEL = ModelSettings(depth=4, aspect_ratio=32, head_dim=32, num_kv_heads=2, sequence_len=256)
OPTIM = OptimSettings(
    matrix_lr=0.003, embedding_lr=0.026, unembedding_lr=0.001, scalar_lr=0.01, smear_lr=0.01, weight_decay=0.05
)
SCHEDULE = ScheduleSettings(warmup_steps=5)
# Deviation of what is added to every first weight. With the recipe's own, the gradients of the residual factors are
# zero but for rounding (every layer adds nothing, and the last norm takes any factor away), AdamW makes whole steps of
# that, and the curves of two correct machines part by hundredths of a nat.
AWAY = 0.02

Loss = Callable[[Tensor, Tensor], Tensor]


def model_config(dtype: DType) -> GPTConfig:
    """The model, computing in ``dtype``."""
    return resolve_model(MODEL, VOCAB_SIZE, dtype)


@functools.cache
def batches(seed: int) -> tuple[StepBatch, ...]:
    """The rows of each step, and of one more: int64 (ROWS_PER_STEP, T)."""
    words, length = language(seed), MODEL.sequence_len + 1
    rows = torch.tensor([next(words) for _ in range((NUM_STEPS + 1) * ROWS_PER_STEP * length)])
    steps = rows.view(NUM_STEPS + 1, ROWS_PER_STEP, length)
    return tuple(StepBatch(part[:, :-1], part[:, 1:], part[:, 1:].numel()) for part in steps)


def language(seed: int) -> Iterator[int]:
    """Tokens of documents without end; 0 begins a document.

    Words are as unevenly frequent as in a real text (Zipf), half of them follow from the word before, and phrases of a
    document come again.
    """
    draw = random.Random(seed).random  # the one method that gives the same numbers in every version of Python
    cumulative = list(accumulate(1 / (rank + 2) for rank in range(VOCAB_SIZE - 1)))
    while True:
        document = [0]
        for _ in range(20 + int(300 * draw())):
            kind = draw()
            if kind < 0.5:
                document.append(1 + document[-1] * 7919 % 641 * int(1 + 3 * draw()) % (VOCAB_SIZE - 1))
            elif kind < 0.9 or len(document) < 9:
                document.append(1 + bisect(cumulative, draw() * cumulative[-1], hi=VOCAB_SIZE - 2))
            else:
                place = int(draw() * (len(document) - 8))
                document += document[place : place + 8]
        yield from document


def first_net(seed: int, dtype: DType, net: GPT | None = None) -> GPT:
    """A network with its first weights.

    Args:
        net: an older one to take instead of a new one (a compiled function belongs to its network).
    """
    net = init_weights(net or GPT(model_config(dtype)).materialise(), seed)
    away = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += AWAY * torch.randn(parameter.shape, generator=away)
    return net


def first_optimizer(net: GPT, dtype: DType) -> MuonAdamW:
    """The optimizer of a network that computes in ``dtype``."""
    hyper = resolve_hyperparameters(OPTIM, width=net.config.width, compute_dtype=dtype)
    optimizer = build_optimizer(net.named_parameters(), parameter_roles(net), hyper)
    optimizer.allocate_state()
    return optimizer


class Training(BareModule):
    """THE training step on the batches, without Lightning."""

    def __init__(self, seed: int, dtype: DType, net: GPT | None = None, loss: Loss | None = None) -> None:
        net = first_net(seed, dtype, net)
        super().__init__(net, first_optimizer(net, dtype), SCHEDULE, NUM_STEPS, DEVICE_BATCH_SIZE)
        self.batches, self._other_loss = batches(seed), loss

    def weighted_loss(self, inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The network's, or the one that was given."""
        if self._other_loss is None:
            return super().weighted_loss(inputs, targets, weights)
        return self._other_loss(inputs, targets)

    def losses(self) -> Iterator[float]:
        """Train; gives the loss of each step in nats per target."""
        while self.global_step < NUM_STEPS:
            yield self.step(self.batches[self.global_step]).loss
            self.global_step += 1


@dataclass(frozen=True)
class Gradients:
    """Of the loss of a step, with the first weights: float64, all parameters of a role flat."""

    token_losses: Tensor
    by_role: dict[str, Tensor]


def gradients(seed: int, dtype: DType, net: GPT | None = None, loss: Loss | None = None) -> Gradients:
    """Losses of each token and gradients of a batch that no step has, computed in ``dtype``."""
    net = first_net(seed, dtype, net).set_compute_dtype(TORCH_DTYPES[dtype])
    batch = batches(seed)[NUM_STEPS]
    with torch.no_grad():
        token_losses = net.losses(batch.inputs, batch.targets).double()
    _backward(net, batch, loss)
    found = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    net.zero_grad(set_to_none=True)
    return Gradients(token_losses, _by_role(net, found))


def updates(seed: int, dtype: DType) -> dict[str, Tensor]:
    """What the optimizer of a model that computes in ``dtype`` makes of three float32 gradients, by role, float64.

    All three are taken at the first weights, so that they are the same whatever the optimizer does.
    """
    net = first_net(seed, "float32")
    first = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    optimizer = first_optimizer(net, dtype)
    for step, by_name in enumerate(_exact_gradients(seed)):
        for name, parameter in net.named_parameters():
            parameter.grad = by_name[name].clone()
        optimizer.set_step_values(schedule_values(SCHEDULE, step, NUM_STEPS))
        optimizer.step()
    return _by_role(net, {name: parameter.detach() - first[name] for name, parameter in net.named_parameters()})


@functools.cache
def _exact_gradients(seed: int) -> tuple[dict[str, Tensor], ...]:
    net, all_steps = first_net(seed, "float32"), []
    for batch in batches(seed)[:3]:
        _backward(net, batch, None)
        all_steps.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    return tuple(all_steps)


def _backward(net: GPT, batch: StepBatch, loss: Loss | None) -> None:
    net.zero_grad(set_to_none=True)
    for inputs, targets, _ in micro_batches(batch, DEVICE_BATCH_SIZE):
        ((loss or net.weighted_loss)(inputs, targets) / batch.num_targets).backward()


def _by_role(net: GPT, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    for name, role in parameter_roles(net).items():
        parts.setdefault(role, []).append(tensors[name].double().flatten())
    return {role: torch.cat(flat) for role, flat in parts.items()}
