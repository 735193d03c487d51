"""THE training step: micro-batches, clipping, float16. Several processes are in test_step_processes.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import nanochat_pl.training.nonfinite_guard as loss_scale_module
from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.common.errors import UserError
from nanochat_pl.data.batch import StepBatch, micro_batches, num_micro_batches
from nanochat_pl.training.datamodule import StepRows
from nanochat_pl.training.nonfinite_guard import MAX_IN_A_ROW, MOST, START, LossScale
from tests.helpers.steps import BATCH, StepLoop


def test_a_smaller_device_batch_size_in_the_middle_changes_only_the_order_of_sums() -> None:
    """Tolerance: float32 sums in another order, over six steps."""
    whole, halved = StepLoop(4), StepLoop(4)
    expected = whole.train_steps(BATCH, 6)
    losses = halved.train_steps(BATCH, 3)
    halved.device_batch_size = 2
    losses += halved.train_steps(BATCH, 3)
    assert max(abs(one - other) for one, other in zip(losses, expected, strict=True)) < 1e-5
    assert losses[:3] == expected[:3] and expected[-1] < expected[0]


@pytest.mark.parametrize("own", [0, 1, 3, 5])
@pytest.mark.parametrize("device_batch_size", [1, 2, 8])
def test_every_process_makes_as_many_micro_batches_as_the_largest_share_has(own: int, device_batch_size: int) -> None:
    inputs = torch.arange(own * 4).view(own, 4)
    parts = list(micro_batches(StepBatch(inputs, inputs + 1, own * 4, num_rows=5), device_batch_size))
    assert len(parts) == num_micro_batches(5, device_batch_size)
    assert all(ids.shape == goals.shape == (device_batch_size, 4) for ids, goals, _ in parts)
    targets = torch.cat([goals for _, goals, _ in parts])
    assert torch.equal(torch.cat([ids for ids, _, _ in parts])[:own], inputs) and torch.equal(targets[:own], inputs + 1)
    assert (targets[own:] == IGNORE_INDEX).all()


def test_ids_are_narrow_on_their_way_and_wide_in_the_step() -> None:
    """A loader process hands a step over in shared memory; gather and scatter want 64 bits."""

    class Two:
        def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            ids = numbers[:, None] + np.arange(4)
            return ids, np.where(ids == 1, IGNORE_INDEX, ids)

        def __len__(self) -> int:
            return 2

    batch = StepRows(Two(), 2)[0]
    assert batch.inputs.dtype == batch.targets.dtype == torch.int32
    assert batch.num_targets == 6 and batch.targets.tolist()[0] == [0, IGNORE_INDEX, 2, 3]
    for inputs, targets, _ in micro_batches(batch, 2):
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.tolist() == [[0, 1, 2, 3], [1, 2, 3, 4]]


def test_a_step_without_targets_is_refused() -> None:
    loop = StepLoop()
    empty = StepBatch(BATCH.inputs, torch.full_like(BATCH.targets, IGNORE_INDEX), 0)
    with pytest.raises(UserError, match="step 1: none of its rows"):
        loop.train_steps(empty)


@pytest.mark.parametrize("factor", [0.1, 0.9, 1.5])
def test_clipping_is_that_of_torch(factor: float) -> None:
    """Gradients as ``torch.nn.utils.clip_grad_norm_`` leaves them, and the norm before clipping; tolerance: float32."""
    plain = StepLoop()
    norm = plain.step(BATCH).gradient_norm
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in plain.gradients.values()]
    for parameter, gradient in zip(parameters, plain.gradients.values(), strict=True):
        parameter.grad = gradient.clone()
    expected = torch.nn.utils.clip_grad_norm_(parameters, factor * norm)
    clipped = StepLoop(max_grad_norm=factor * norm)
    result = clipped.step(BATCH)
    assert result.gradient_norm == pytest.approx(expected.item(), rel=1e-6)
    for parameter, gradient in zip(parameters, clipped.gradients.values(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-9)
    if factor > 1:
        assert all(torch.equal(clipped.gradients[name], plain.gradients[name]) for name in plain.gradients)


def test_float16_learns_what_float32_learns() -> None:
    """Tolerance: half a percent, of numbers with eleven bits."""
    half, full = StepLoop(dtype="float16"), StepLoop()
    assert half.train_steps(BATCH, 6) == pytest.approx(full.train_steps(BATCH, 6), rel=5e-3)
    assert half.guard.skipped_steps == 0 and half.guard.metrics()["train/loss_scale"] == START


def test_the_scale_goes_out_of_the_gradients_before_they_are_clipped() -> None:
    """The clipped gradient has the norm that was asked for; tolerance: float32 sums."""
    loop = StepLoop(dtype="float16", max_grad_norm=0.25)
    norm = loop.step(BATCH).gradient_norm
    assert norm == pytest.approx(StepLoop().step(BATCH).gradient_norm, rel=1e-2)
    clipped = torch.cat([gradient.flatten() for gradient in loop.gradients.values()]).norm().item()
    assert clipped == pytest.approx(0.25, rel=1e-4)


def test_the_step_that_doubles_the_scale_takes_its_own_one_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the next step's: its gradient was half of what was asked for."""
    monkeypatch.setattr(loss_scale_module, "GOOD_STEPS", 2)
    loop, norms = StepLoop(dtype="float16", max_grad_norm=0.25), []
    for _ in range(4):
        loop.step(BATCH)
        norms.append(torch.cat([gradient.flatten() for gradient in loop.gradients.values()]).norm().item())
    assert loop.guard.loss_scale.factor == 4 * START
    assert norms == pytest.approx([0.25] * 4, rel=1e-4)


def test_an_overflow_skips_the_step_and_halves_the_scale(capsys: pytest.CaptureFixture[str]) -> None:
    loop = StepLoop(dtype="float16")
    before = loop.weights()
    loop.break_gradient()
    result = loop.step(BATCH)
    assert result.skipped and loop.guard.loss_scale.factor == START / 2 and loop.guard.skipped_steps == 1
    assert all(torch.equal(weight, before[name]) for name, weight in loop.weights().items())
    assert "step 1: float16 overflowed" in capsys.readouterr().out
    loop.after_backward = lambda: None
    result = loop.step(BATCH)
    assert not result.skipped and loop.guard.loss_scale.factor == START / 2
    assert not all(torch.equal(weight, before[name]) for name, weight in loop.weights().items())


def test_a_scale_that_is_really_too_large_comes_down_until_it_fits() -> None:
    """No injected fault: 2**30 overflows float16 by itself."""
    loop = StepLoop(dtype="float16")
    loop.guard.loss_scale.factor = 2.0**30
    losses = loop.train_steps(BATCH, 25)
    assert 0 < loop.guard.skipped_steps < MAX_IN_A_ROW and loop.guard.loss_scale.factor < 2.0**30
    assert losses[-1] < losses[0] and loop.is_finite()


def test_twenty_overflows_in_a_row_end_the_run() -> None:
    loop = StepLoop(dtype="float16")
    loop.break_gradient()
    with pytest.raises(UserError, match="20 steps in a row") as error:
        loop.train_steps(BATCH, 40)
    assert loop.global_step == MAX_IN_A_ROW - 1 and "model.compute_dtype=bfloat16" in error.value.fix
    assert loop.is_finite()


def test_nineteen_overflows_in_a_row_do_not() -> None:
    loop = StepLoop(dtype="float16")
    loop.break_gradient()
    loop.train_steps(BATCH, MAX_IN_A_ROW - 1)
    loop.after_backward = lambda: None
    loop.train_steps(BATCH)
    loop.break_gradient()
    loop.train_steps(BATCH, MAX_IN_A_ROW - 1)
    assert loop.guard.skipped_steps == 2 * (MAX_IN_A_ROW - 1)


def test_the_scale_grows_after_good_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale_module, "GOOD_STEPS", 3)
    scale = LossScale(active=True)
    seen = []
    for overflowed in (False, False, True, False, False, False, False):
        scale.update(overflowed)
        seen.append(scale.factor / START)
    assert seen == [1, 1, 0.5, 0.5, 0.5, 1, 1]
    scale.factor = MOST
    for _ in range(3):
        scale.update(False)
    assert scale.factor == MOST


def test_a_file_of_a_run_in_another_type_does_not_switch_it_off() -> None:
    """There the factor is 1, and float16 would go on without any scale."""
    half, full = LossScale(active=True), LossScale(active=False)
    half.load_state_dict(full.state_dict())
    assert half.factor == START
    half.update(overflowed=True)
    again = LossScale(active=True)
    again.load_state_dict(half.state_dict())
    assert again.factor == START / 2
    full.load_state_dict(half.state_dict())
    assert full.factor == 1


def test_a_loss_that_is_not_finite_is_no_overflow() -> None:
    """A smaller scale has no say in it: the run ends, and the scale stays."""
    loop = StepLoop(dtype="float16")
    with torch.no_grad():
        loop.net.lm_head.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="the loss is nan"):
        loop.train_steps(BATCH)
    assert loop.guard.loss_scale.factor == START
