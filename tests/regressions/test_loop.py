"""Bugs of training loops, held against THE training step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.model.config import ModelSettings
from nanochat_pl.optim.config import OptimSettings
from nanochat_pl.optim.schedules import ScheduleSettings, schedule_values
from nanochat_pl.planning import HorizonSettings, Plan, RowOptions, make_plan
from nanochat_pl.training.callbacks import metrics as metrics_module
from nanochat_pl.training.callbacks.metrics import StepClock, StepMetrics
from tests.helpers.training import SEQUENCE_LEN, Loop, batch_of

NUM_STEPS = 6
RATIOS = (0.0, 0.3, 0.65, 1.0)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 39, 41, 400])
@pytest.mark.parametrize("warmup_steps", [0, 1, 5, 40, 1_000])
def test_the_multiplier_goes_up_in_the_warm_up_down_in_the_warmdown_and_never_below_its_end(
    warmup_steps: int, num_steps: int
) -> None:
    """The multiplier went up where it should go down, or below 0, where warm-up and warmdown were long for the run."""
    for ratio in RATIOS:
        for top, final in ((1.0, 0.0), (1.0, 0.05), (0.8, 0.0), (0.05, 0.5)):
            settings = ScheduleSettings(
                warmup_steps=warmup_steps, warmdown_ratio=ratio, initial_lr_fraction=top, final_lr_fraction=final
            )
            # Some steps past the end too: an estimate of the length that is short must not make a rate negative.
            lrs = [schedule_values(settings, step, num_steps).lr_multiplier for step in range(num_steps + 5)]
            rising, falling = lrs[:warmup_steps], lrs[warmup_steps:]
            assert all(0 < lr <= top for lr in lrs[:num_steps]) and rising == sorted(rising)
            if warmup_steps <= num_steps:
                end = top * final if settings.warmdown_steps(num_steps) else top
                assert falling == sorted(falling, reverse=True) and falling[-1] == pytest.approx(end)
                assert all(end <= lr <= top for lr in falling)
            if warmup_steps < num_steps - settings.warmdown_steps(num_steps):
                assert falling[0] == top


def test_a_step_is_an_optimizer_step_however_many_micro_batches_it_has() -> None:
    """A step count meant micro-batches in one stage and optimizer steps in another; schedules ran out early."""
    batch = batch_of([16] * 4)
    many, one = Loop(device_batch_size=1), Loop(device_batch_size=4)
    many.train_steps(batch, NUM_STEPS)
    one.train_steps(batch, NUM_STEPS)
    assert many.values == one.values == [schedule_values(one.schedule, step, NUM_STEPS) for step in range(NUM_STEPS)]


def test_the_plan_counts_optimizer_steps_whatever_the_device_batch_size() -> None:
    """The number of steps was derived from the micro-batch, so the same budget gave another number of updates."""
    assert small_plan(device_batch_size=1)["num_steps"] == small_plan(device_batch_size=64)["num_steps"]


@pytest.mark.parametrize("device_batch_size", [1, 2, 3])
def test_every_token_weighs_the_same_where_masks_differ(device_batch_size: int) -> None:
    """The mean of micro-batch means gave a row with one target the weight of a row with a thousand."""
    batch = batch_of([16, 1, 7, 2])
    whole, cut = Loop(device_batch_size=4), Loop(device_batch_size)
    with torch.no_grad():
        nats = whole.net.losses(batch.inputs, batch.targets)
    (expected,), (loss,) = whole.train_steps(batch), cut.train_steps(batch)
    assert loss == pytest.approx(nats.sum().item() / 26, rel=1e-6)
    assert loss == pytest.approx(expected, rel=1e-6)
    means = sum((row[goals >= 0].mean() for row, goals in zip(nats, batch.targets, strict=True)), start=torch.zeros(()))
    assert abs(loss - means.item() / 4) > 1e-4
    _assert_same_gradients(whole, cut)


def test_the_loss_is_that_of_the_whole_step() -> None:
    """The logged loss was the last micro-batch's."""
    batch = batch_of([16] * 4)
    loop = Loop(device_batch_size=1)
    with torch.no_grad():
        nats = loop.net.losses(batch.inputs, batch.targets)
    (loss,) = loop.train_steps(batch)
    assert loss == pytest.approx(nats.mean().item(), rel=1e-6)
    assert abs(loss - nats[-1].mean().item()) > 1e-4


@pytest.mark.parametrize("device_batch_size", [1, 2, 3, 4, 9])
def test_tokens_a_second_and_mfu_are_those_of_the_whole_step(
    device_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under accumulation the speed was that of one micro-batch over the time of all, or the other way round."""
    rows, now = 4, 100.0
    monkeypatch.setattr(metrics_module, "time", SimpleNamespace(perf_counter=lambda: now))

    def between_micro_batches(part: int) -> None:
        nonlocal now  # A row takes a quarter of a second, rows that only fill up the last micro-batch take none.
        now += min(device_batch_size, rows - part * device_batch_size) / 4

    loop: Any = Loop(device_batch_size)
    loop.micro_batch_hooks.append(between_micro_batches)
    loop.config.hyperparameters.weight_decay = 0.0
    clock = StepClock()
    metrics = StepMetrics(clock, flops_per_token=1e6, peak_flops=1e9, log_every_steps=1)
    batch = batch_of([16, 1, 7, 2])
    trainer: Any = SimpleNamespace(global_step=0, max_steps=NUM_STEPS, loggers=[])
    metrics.on_train_start(trainer, loop)
    for step in (1, 2):
        (loss,) = loop.train_steps(batch)
        trainer.global_step = step
        metrics.on_train_batch_end(trainer, loop, {"loss": torch.tensor(loss)}, batch, step - 1)
        assert metrics.latest["train/step_seconds"] == pytest.approx(1.0)
        assert metrics.latest["train/tokens_per_second"] == pytest.approx(rows * SEQUENCE_LEN)
        assert metrics.latest["train/mfu"] == pytest.approx(rows * SEQUENCE_LEN * 1e6 / 1e9)
        assert metrics.latest["train/tokens"] == step * rows * SEQUENCE_LEN
        assert metrics.latest["train/flops"] == step * rows * SEQUENCE_LEN * 1e6
        assert metrics.latest["train/seconds"] == pytest.approx(step)
        with clock.paused():
            now += 50  # evaluation and files are not the training's time


@pytest.mark.parametrize("depth", [*range(1, 34, 2)])
def test_odd_depths_have_whole_heads(depth: int) -> None:
    """The width of an odd depth was no multiple of the head's, and the run ended where heads are split."""
    plan = small_plan(model=ModelSettings(depth=depth))
    assert plan["width"] % plan["num_heads"] == 0 and plan["width"] // plan["num_heads"] == 128
    assert plan["num_steps"] >= 1


def test_a_batch_that_is_not_divisible_is_trained_on_whole() -> None:
    """A bare assertion ended runs whose batch the device's rows did not divide."""
    batch = batch_of([16] * 5)
    whole, cut = Loop(device_batch_size=5), Loop(device_batch_size=3)
    assert cut.train_steps(batch) == pytest.approx(whole.train_steps(batch), rel=1e-6)
    _assert_same_gradients(whole, cut)


def test_a_batch_that_is_no_whole_number_of_rows_names_the_nearest_that_are() -> None:
    """A bare assertion said neither which setting was wrong nor which would be right."""
    with pytest.raises(UserError, match="total_batch_tokens=5000") as error:
        small_plan(total_batch_tokens=5000)
    assert "4864 or 5120" in str(error.value.fix)
    with pytest.raises(UserError) as error:
        small_plan(total_batch_tokens=100)
    assert error.value.fix == "Set total_batch_tokens=256."


def small_plan(
    model: ModelSettings | None = None, total_batch_tokens: int | None = None, device_batch_size: int | None = None
) -> Plan:
    """A plan for rows of 256 tokens, or for those of ``model``."""
    model = model or ModelSettings(depth=4, head_dim=64, sequence_len=256)
    horizon = HorizonSettings(total_batch_tokens=total_batch_tokens)
    return make_plan(
        model, horizon, OptimSettings(), vocab_size=4096, options=RowOptions(device_batch_size=device_batch_size)
    )


def _assert_same_gradients(one: Loop, other: Loop) -> None:
    """Up to the order of summation: 1e-6 of each norm, and 1e-8 for scalars, whose sums nearly cancel.

    Weights after the step would not do: the decay's mask may flip where an update is near zero.
    """
    assert one.gradients.keys() == other.gradients.keys()
    for name, gradient in one.gradients.items():
        distance = (gradient - other.gradients[name]).norm()
        assert distance <= 1e-6 * gradient.norm() + 1e-8, f"{name}: {distance:.1e}"
