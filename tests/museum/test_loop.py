"""Bugs of training loops, held against THE training step."""

from __future__ import annotations

import pytest
import torch

from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT, parameter_roles
from nanochat_pl.model.init import init_weights
from nanochat_pl.optim import OptimSettings, ScheduleSettings, StepValues, build_optimizer, resolve_hyperparameters
from nanochat_pl.optim.schedules import schedule_values
from nanochat_pl.training.step import StepBatch, training_step

NUM_STEPS = 6


class Loop:
    """What the training step needs of a stage, without Lightning, and a record of what the schedule was set to."""

    def __init__(self, device_batch_size: int) -> None:
        # Depth 3: at depth 2 the middle of the stream is its end, and backout has no gradient but rounding.
        settings = ModelSettings(depth=3, aspect_ratio=16, head_dim=8, sequence_len=16)
        self.net = init_weights(GPT(resolve_model(settings, 40, "float32")).materialise(), seed=1)
        with torch.no_grad():  # both output projections begin at zero: a gradient would be hidden behind them
            for parameter in self.net.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        hyper = resolve_hyperparameters(OptimSettings(), width=self.net.config.width)
        self.optimizer = build_optimizer(self.net.named_parameters(), parameter_roles(self.net), hyper)
        self.optimizer.allocate_state()
        self.values: list[StepValues] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self._set_step_values = self.optimizer.set_step_values
        self.optimizer.set_step_values = self._record  # type: ignore[method-assign]
        self.schedule = ScheduleSettings(warmup_steps=2)
        self.num_steps, self.global_step = NUM_STEPS, 0
        self.device, self.device_batch_size = torch.device("cpu"), device_batch_size
        self.weighted_loss = self.net.weighted_loss
        self.manual_backward = torch.Tensor.backward

    def _record(self, values: StepValues) -> None:
        """The schedule's values and the gradients, both final just before the optimizer steps."""
        self.values.append(values)
        self.gradients = {name: p.grad.clone() for name, p in self.net.named_parameters() if p.grad is not None}
        self._set_step_values(values)

    def between_micro_batches(self, part: int) -> None:
        pass

    def train(self, batch: StepBatch, num_steps: int = 1) -> list[float]:
        losses = []
        for _ in range(num_steps):
            losses.append(training_step(self, batch).item())  # type: ignore[arg-type]
            self.global_step += 1
        return losses


def batch_of(num_targets: list[int]) -> StepBatch:
    """A row for each number, with so many targets."""
    generator = torch.Generator().manual_seed(3)
    inputs, targets = torch.randint(40, (2, len(num_targets), 16), generator=generator).unbind()
    for row, count in enumerate(num_targets):
        targets[row, count:] = IGNORE_INDEX
    return StepBatch(inputs, targets, sum(num_targets))


def test_museum_2_a_step_is_an_optimizer_step_however_many_micro_batches_it_has() -> None:
    """A step count meant micro-batches in one stage and optimizer steps in another; schedules ran out early."""
    batch = batch_of([16] * 4)
    many, one = Loop(device_batch_size=1), Loop(device_batch_size=4)
    many.train(batch, NUM_STEPS)
    one.train(batch, NUM_STEPS)
    assert many.values == one.values == [schedule_values(one.schedule, step, NUM_STEPS) for step in range(NUM_STEPS)]


@pytest.mark.parametrize("device_batch_size", [1, 2, 3])
def test_museum_5_every_token_weighs_the_same_where_masks_differ(device_batch_size: int) -> None:
    """The mean of micro-batch means gave a row with one target the weight of a row with a thousand."""
    batch = batch_of([16, 1, 7, 2])
    whole, cut = Loop(device_batch_size=4), Loop(device_batch_size)
    with torch.no_grad():
        nats = whole.net.losses(batch.inputs, batch.targets)
    (expected,), (loss,) = whole.train(batch), cut.train(batch)
    assert loss == pytest.approx(nats.sum().item() / 26, rel=1e-6)
    assert loss == pytest.approx(expected, rel=1e-6)
    means = sum((row[goals >= 0].mean() for row, goals in zip(nats, batch.targets, strict=True)), start=torch.zeros(()))
    assert abs(loss - means.item() / 4) > 1e-4
    _assert_same_gradients(whole, cut)


def test_museum_6_the_loss_is_that_of_the_whole_step() -> None:
    """The logged loss was the last micro-batch's."""
    batch = batch_of([16] * 4)
    loop = Loop(device_batch_size=1)
    with torch.no_grad():
        nats = loop.net.losses(batch.inputs, batch.targets)
    (loss,) = loop.train(batch)
    assert loss == pytest.approx(nats.mean().item(), rel=1e-6)
    assert abs(loss - nats[-1].mean().item()) > 1e-4


def test_museum_19_a_batch_that_is_not_divisible_is_trained_on_whole() -> None:
    """A bare assertion ended runs whose batch the device's rows did not divide."""
    batch = batch_of([16] * 5)
    whole, cut = Loop(device_batch_size=5), Loop(device_batch_size=3)
    assert cut.train(batch) == pytest.approx(whole.train(batch), rel=1e-6)
    _assert_same_gradients(whole, cut)


def _assert_same_gradients(one: Loop, other: Loop) -> None:
    """Up to the order of summation: 1e-6 of each norm, and 1e-8 for scalars, whose sums nearly cancel.

    Weights after the step would not do: the decay's mask may flip where an update is near zero.
    """
    assert one.gradients.keys() == other.gradients.keys()
    for name, gradient in one.gradients.items():
        distance = (gradient - other.gradients[name]).norm()
        assert distance <= 1e-6 * gradient.norm() + 1e-8, f"{name}: {distance:.1e}"
