"""A loss or a gradient that is not finite: what is said, what is skipped, what a resume file keeps of it."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from nanochat_pl.common.errors import UserError
from nanochat_pl.training.checkpoint.resume import resume_files
from nanochat_pl.training.module import LMModule
from nanochat_pl.training.nonfinite_guard import MAX_IN_A_ROW, last_good_file
from tests.helpers.steps import BATCH, StepLoop
from tests.helpers.training import fit_tiny


def test_the_settings_reach_the_stage(place: Path, train: Callable[..., int]) -> None:
    """float16, clipping and what is to be done come from the command line; metrics go into metrics.csv."""
    given = ("model.compute_dtype=float16", "optim.max_grad_norm=0.001", "trainer.on_nonfinite=skip", "max_steps=2")
    assert train("run=guarded", "device_batch_size=auto", *given) == 0
    with (place / "runs" / "guarded" / "base" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[1:]  # from step 1 on
    assert [float(row["train/loss_scale"]) for row in rows] == [2.0**16] * 2
    assert all(float(row["train/gradient_norm"]) > 0.001 and row["train/skipped_steps"] == "0" for row in rows)


def resume_file(path: Path, value: float) -> Path:
    """What :func:`last_good_file` reads of one."""
    torch.save({"state_dict": {"fine": torch.ones(3), "weight": torch.tensor([1.0, value])}}, path)
    return path


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_stop_the_run_and_are_named(value: float) -> None:
    loop = StepLoop()
    loop.train_steps(BATCH, 2)
    with torch.no_grad():
        loop.net.lm_head.weight[3, 1] = value
    before, moments = loop.weights(), loop.optimizer.moments_by_name()
    with pytest.raises(UserError) as error:
        loop.train_steps(BATCH)
    # The softcap makes a finite loss of an infinite weight, and no finite gradient.
    metric = "the loss is nan" if math.isnan(value) else "the norm of the gradients is nan"
    assert f"step 3: {metric}" in error.value.problems[0] and "lm_head.weight" in str(error.value)
    assert all(torch.equal(moment, moments[name]) for name, moment in loop.optimizer.moments_by_name().items())
    for name, weight in loop.weights().items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0, equal_nan=True)


def test_the_rows_are_named_and_where_to_go_on_from(tmp_path: Path) -> None:
    loop = StepLoop()
    loop.files = [resume_file(tmp_path / "step=000008.ckpt", math.nan), resume_file(tmp_path / "step=000006.ckpt", 1)]
    loop.global_step = 8
    forward = loop.weighted_loss

    def nan_of_a_row(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nats = forward(inputs, targets)
        if len(loop._row_losses) == 2:  # the rows 2 and 3 of the step
            loop._row_losses[-1][1] = torch.nan
            nats = nats * torch.nan
        return nats

    loop.weighted_loss = nan_of_a_row  # type: ignore[method-assign]
    with pytest.raises(UserError) as error:
        loop.train_steps(BATCH._replace(first_row=40))
    text = str(error.value)
    assert "step 9: the loss is nan. Its rows are 40 to 44." in text and "not finite: 43." in text
    assert "step=000006.ckpt" in text and "step=000008.ckpt" not in text
    assert "doctor step=9" in error.value.fix and "trainer.on_nonfinite=skip" in error.value.fix


def test_a_gradient_that_is_not_finite_stops_where_the_loss_is() -> None:
    loop = StepLoop()
    loop.break_gradient(math.nan)
    before = loop.weights()
    with pytest.raises(UserError, match="the norm of the gradients is nan") as error:
        loop.train_steps(BATCH)
    assert "The loss of each row is finite" in str(error.value) and "none" in str(error.value)
    assert all(torch.equal(weight, before[name]) for name, weight in loop.weights().items())


def test_skip_changes_nothing_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """The steps with the fault are left out; those around it are as if it had never been."""
    skipping, clean = StepLoop(on_nonfinite="skip"), StepLoop()
    expected = clean.train_steps(BATCH, 2)
    losses = skipping.train_steps(BATCH)
    before, moments = skipping.weights(), skipping.optimizer.moments_by_name()
    skipping.break_gradient(math.nan)
    skipping.train_steps(BATCH, 2)
    assert all(torch.equal(weight, before[name]) for name, weight in skipping.weights().items())
    assert all(torch.equal(moment, moments[name]) for name, moment in skipping.optimizer.moments_by_name().items())
    assert skipping.guard.metrics()["train/skipped_steps"] == 2 and "2 so far" in capsys.readouterr().out
    skipping.backward, skipping.global_step = lambda: None, 1
    assert losses + skipping.train_steps(BATCH) == expected


def test_skipping_has_an_end() -> None:
    """Weights that give no finite loss give none in the next step either."""
    loop = StepLoop(on_nonfinite="skip")
    loop.break_gradient(math.nan)
    with pytest.raises(UserError, match=f"{MAX_IN_A_ROW}th step in a row"):
        loop.train_steps(BATCH, 50)
    assert loop.global_step == MAX_IN_A_ROW - 1


def test_no_good_file_is_said_so(tmp_path: Path) -> None:
    assert last_good_file([resume_file(tmp_path / "a.ckpt", math.inf)]) is None


class _Fault(Callback):
    """Breaks the gradient in some steps (counted from 0), and the run in one."""

    def __init__(self, steps: tuple[int, ...], ends: int | None = None) -> None:
        self.steps, self.ends = steps, ends

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.ends:
            raise InterruptedError
        weight = pl_module.net.lm_head.weight
        broken = trainer.global_step in self.steps
        self.hook = weight.register_hook(lambda gradient: gradient * torch.inf) if broken else None

    def on_train_batch_end(self, *arguments: Any) -> None:
        if self.hook is not None:
            self.hook.remove()


def _same(one: LMModule, other: LMModule) -> bool:
    assert one.net is not None and other.net is not None
    weights = other.net.state_dict()
    return all(torch.equal(weight, weights[name]) for name, weight in one.net.state_dict().items())


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float16"])
def test_a_resumed_run_goes_on_with_scale_and_count(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: overflows in two steps, a stop between them, growth of the scale after it."""
    monkeypatch.setattr("nanochat_pl.training.nonfinite_guard.GOOD_STEPS", 3)
    recipe = {"compute_dtype": dtype, "on_nonfinite": "skip", "max_grad_norm": 0.5}
    whole = fit_tiny(tmp_path / "whole", 8, callbacks=[_Fault((1, 4))], recipe=recipe)
    with pytest.raises(InterruptedError):
        fit_tiny(tmp_path / "two", 8, callbacks=[_Fault((1, 4), ends=4)], recipe=recipe)
    resumed = fit_tiny(tmp_path / "two", 8, callbacks=[_Fault((4,))], recipe=recipe)
    assert whole.guard.skipped_steps == resumed.guard.skipped_steps == 2
    assert whole.guard.state_dict() == resumed.guard.state_dict() and _same(whole, resumed)
    assert whole.guard.loss_scale.factor == (2.0**15 if dtype == "float16" else 1)
    with (tmp_path / "two" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["train/skipped_steps"] for row in rows] == ["0", "1", "1", "1", "2", "2", "2", "2"]
    assert all(math.isfinite(float(row["train/loss_smoothed"])) for row in rows)
    assert rows[1]["train/gradient_norm"] == "" and float(rows[2]["train/gradient_norm"]) > 0
    assert bool(rows[0]["train/loss_scale"]) == (dtype == "float16")


def test_the_last_good_file_of_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 4: .*gradients is (inf|nan)") as error:
        fit_tiny(tmp_path, 6, callbacks=[_Fault((3,))])
    newest = resume_files(tmp_path / "checkpoints")[0]
    assert newest.name == "step=000002.ckpt" and str(newest) in str(error.value)
    assert "Its rows are 12 to 15." in str(error.value)


def test_a_loss_of_a_skipped_step_does_not_enter_the_smoothed_one(tmp_path: Path) -> None:
    """Also where it is the very first."""

    class Nan(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                pl_module.net.smear_lambda.fill_(math.nan if trainer.global_step == 0 else 0.0)

    stage = fit_tiny(tmp_path, 3, callbacks=[Nan()], recipe={"on_nonfinite": "skip"})
    assert stage.guard.skipped_steps == 1
    with (tmp_path / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["train/loss"] == ""
    assert float(rows[1]["train/loss_smoothed"]) == pytest.approx(float(rows[1]["train/loss"]), rel=1e-9)
