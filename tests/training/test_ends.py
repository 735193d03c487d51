"""Ends of a training besides its last step: a callback's, and a signal then; and what must not be an end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from nanochat_pl.bundle import tensors
from nanochat_pl.common.errors import UserError
from nanochat_pl.training import run as training_run
from nanochat_pl.training.callbacks import evaluation
from nanochat_pl.training.callbacks.graceful_stop import StopRequested
from nanochat_pl.training.checkpoint.resume import resume_files, step_of
from tests.helpers.training import fit_tiny
from tests.training.conftest import copy_unfinished, same_weights, weights_of
from tests.training.test_callbacks import begun, early_stopping, finished_step


class Ends(Callback):
    """Ends the training after a step, and just then a signal comes."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.after

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def steps_of(folder: Path) -> list[int]:
    return [step_of(path) for path in resume_files(folder / "checkpoints")]


def test_a_signal_after_a_callback_ended_the_training(tmp_path: Path) -> None:
    """It was a stop after a step of which there is no file; now what is left is done: measuring and writing."""
    stage = fit_tiny(tmp_path, num_steps=8, checkpoint_every_steps=2, callbacks=[Ends(after=3)])
    assert stage.global_step == 3 and steps_of(tmp_path) == [2]


def test_a_signal_after_the_last_step(tmp_path: Path) -> None:
    with pytest.raises(StopRequested):
        fit_tiny(tmp_path, num_steps=4, checkpoint_every_steps=100, callbacks=[Ends(after=100)])
    assert steps_of(tmp_path) == [4]


@pytest.mark.parametrize(
    ("owner", "name", "is_finished"),
    [
        (evaluation.Validation, "measure", False),
        (tensors, "write_atomically", True),
        (training_run, "write_json", True),
    ],
)
def test_a_signal_after_the_training_waits_for_the_bundle(
    place: Path,
    train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: Any,
    name: str,
    is_finished: bool,
) -> None:
    """It was a KeyboardInterrupt in the middle of writing it. What takes long, a measurement, is not waited for."""
    folder = copy_unfinished(place, f"late-{name}")
    do, came = getattr(owner, name), []

    def interrupted(*arguments: Any, **named: Any) -> Any:
        if not came and "plan.json" not in str(arguments[0]):
            came.append(os.kill(os.getpid(), signal.SIGINT))
        return do(*arguments, **named)

    monkeypatch.setattr(owner, name, interrupted)
    assert train(f"run=late-{name}") == 128 + signal.SIGINT and came
    printed = capsys.readouterr()
    assert "Stopped after step 40." in printed.out and "Traceback" not in printed.err
    assert (folder / "base" / "finished.json").exists() == is_finished
    assert train(f"run=late-{name}") == 0
    assert same_weights(weights_of(folder, "base"), weights_of(place / "runs" / "whole", "base"))


def test_what_a_callback_ended_stays_finished_unless_there_are_more_steps(
    place: Path,
    train: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 40 steps 15 were made: asked for the same 40, it was opened and trained again."""
    folder, settings = begun(place, "ended"), ["run=ended", "evaluation.every_steps=5", early_stopping(tmp_path)]
    assert train(*settings) == 0 and finished_step(folder) == 15
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "lock"}
    capsys.readouterr()
    assert train(*settings, "resume_with_changes=true") == 0
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    longer = [*settings, "resume_with_changes=true", "max_steps=50"]
    plan = (folder / "base" / "plan.json").read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(training_run, "fit", _refuse)
        assert train(*longer) == 2
    assert (folder / "base" / "plan.json").read_bytes() == plan and finished_step(folder) == 15
    assert train(*longer) == 0
    assert "Horizon 40 → 50 steps." in capsys.readouterr().out
    assert finished_step(folder) == 15, "it is opened, and there is no patience left"


def _refuse(*arguments: Any) -> None:
    raise UserError("not like this")


def test_samples_that_memory_is_too_small_for_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    write = evaluation.write_samples

    def run_out(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return write(*arguments)

    monkeypatch.setattr(evaluation, "write_samples", run_out)
    stage = fit_tiny(tmp_path, num_steps=6, every_steps=2)
    assert stage.global_step == 6 and stage.net is not None and stage.net.training
    assert "Samples after step 2: out of memory" in capsys.readouterr().out
    steps = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert '"step": 4' in steps and '"step": 2' not in steps
