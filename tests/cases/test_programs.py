"""Kinds of faults with other people's code: loggers and callbacks that are missing, die or are none; compilers."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers import __all__ as all_loggers

from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import UserError
from nanochat_pl.config.instantiate import make_objects, problems_of_objects
from nanochat_pl.training import lightning_callbacks
from nanochat_pl.training.callbacks.graceful_stop import StopRequested
from nanochat_pl.training.checkpoint.resume import resume_files, step_of
from nanochat_pl.training.guarded import guard_callbacks, guard_loggers
from nanochat_pl.training.lightning_callbacks import PACKAGES
from tests.helpers.training import fit_tiny

LOGGERS = "lightning.pytorch.loggers"


def steps_of(folder: Path) -> list[int]:
    return [step_of(path) for path in resume_files(folder / "checkpoints")]


class Dies(CSVLogger):
    """Its process is killed after some metrics."""

    def __init__(self, folder: Path, error: Exception, method: str = "log_metrics") -> None:
        super().__init__(str(folder))
        self.error, self.method, self.calls = error, method, 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._may_die("log_metrics")

    def finalize(self, status: str) -> None:
        self._may_die("finalize")

    def _may_die(self, method: str) -> None:
        self.calls += 1
        if method == self.method and (self.calls > 3 or method != "log_metrics"):
            raise self.error


@pytest.mark.parametrize(
    ("error", "method"),
    [
        (BrokenPipeError(32, "Broken pipe"), "log_metrics"),
        (ConnectionResetError("Connection lost"), "log_metrics"),
        (ValueError("closed"), "finalize"),
    ],
)
def test_10_a_logger_that_dies_is_left_out(
    error: Exception, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = Dies(tmp_path / "log", error, method)
    fit_tiny(tmp_path, num_steps=8, loggers=guard_loggers({"logger.x": logger}))
    said = capsys.readouterr().out
    assert said.count("is left out from here on; the training goes on") == 1 and f"Dies fails in {method}" in said
    assert str(error) in said
    assert 8 in steps_of(tmp_path) and (method == "finalize" or logger.calls <= 4)


class Fails(Callback):
    def __init__(self, hook: str) -> None:
        self.hook, self.seen = hook, 0

    def on_train_batch_end(self, *rest: Any) -> None:
        self._may_fail("on_train_batch_end")

    def on_train_start(self, *rest: Any) -> None:
        self._may_fail("on_train_start")

    def _may_fail(self, hook: str) -> None:
        self.seen += 1
        if hook == self.hook:
            raise KeyError("what")


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_end"])
def test_a_callback_that_fails_is_left_out(hook: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = Fails(hook)
    fit_tiny(tmp_path, num_steps=4, callbacks=guard_callbacks({"callbacks.x": callback}))
    assert f"Fails fails in {hook} and is left out" in capsys.readouterr().out
    assert max(steps_of(tmp_path)) == 4 and callback.seen <= 2


def test_a_callback_may_stop_the_training(tmp_path: Path) -> None:
    class Stops(Callback):
        def on_train_batch_end(self, *rest: Any) -> None:
            raise StopRequested(signal.SIGTERM, 1)

    with pytest.raises(StopRequested):
        fit_tiny(tmp_path, num_steps=4, callbacks=guard_callbacks({"callbacks.x": Stops()}))


def test_a_logger_that_cannot_start_is_refused(tmp_path: Path) -> None:
    class NoKey(CSVLogger):
        @property
        def experiment(self) -> Any:
            raise RuntimeError("no API key")

    with pytest.raises(UserError, match=r"logger\.x: NoKey cannot be started: RuntimeError: no API key"):
        guard_loggers({"logger.x": NoKey(str(tmp_path))})


class FailsToCompile(Callback):
    """What a compiler that got the signal too ends with."""

    def __init__(self, signum: int | None, before_step: int) -> None:
        self.signum, self.before_step = signum, before_step

    def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == self.before_step:
            if self.signum is not None:
                os.kill(os.getpid(), self.signum)
            raise RuntimeError("CppCompileError: g++ …")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("before_step", [0, 3])
def test_11_a_stop_while_compiling_is_a_stop(signum: int, before_step: int, tmp_path: Path) -> None:
    with pytest.raises(StopRequested) as stop:
        fit_tiny(tmp_path, num_steps=8, callbacks=[FailsToCompile(signum, before_step)])
    assert stop.value.signum == signum and stop.value.__suppress_context__
    assert stop.value.step == (2 if before_step else 0), "of the resume file that is there"


def test_11_without_a_signal_it_is_what_it_was(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="CppCompileError"):
        fit_tiny(tmp_path, num_steps=8, callbacks=[FailsToCompile(None, 1)])


def test_each_logger_of_lightning_is_known() -> None:
    """A new version brings new ones: say what they need."""
    assert set(all_loggers) - {"Logger", "CSVLogger", "TensorBoardLogger"} == set(PACKAGES)


@pytest.mark.parametrize("name", ["expw", "exp_CometLogger", "exp_MLFlowLogger"])
def test_12_a_logger_that_is_not_installed(
    name: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lightning_callbacks, "_is_installed", lambda *names: False)
    file = shared / f"cases/12_logger_not_installed/{name}.yaml"
    assert main(["train", f"experiment={file}", "stage=base", "run=x", "max_steps=6", "paths.cache=c"]) == 2
    error = capsys.readouterr().err
    assert "error: logger.wandb: lightning.pytorch.loggers." in error and ": pip install " in error
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_packages_are_looked_for_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb_of_a_run").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not lightning_callbacks._is_installed("wandb-of-a-run", "wandb_of_a_run"), "a folder is no package"
    (tmp_path / "there.py").write_text("raise AssertionError")
    assert lightning_callbacks._is_installed("no-distribution", "there")


@pytest.mark.parametrize(
    ("group", "target"),
    [
        ("callbacks", "lightning.pytorch.cli.LightningCLI"),
        ("callbacks", f"{LOGGERS}.CSVLogger"),
        ("logger", "torchmetrics.MeanMetric"),
        ("logger", "lightning.pytorch.callbacks.Timer"),
        ("logger", "lightning.pytorch.profilers.SimpleProfiler"),
    ],
)
def test_a_class_is_what_its_place_wants(group: str, target: str) -> None:
    (problem,) = problems_of_objects({"x": {"_target_": target}}, group)
    assert "is no Callback of" in problem if group == "callbacks" else "is no Logger of" in problem


def test_whatever_a_constructor_raises_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, *arguments: Any, **keywords: Any) -> None:
        raise ModuleNotFoundError("No module named 'mlflow'", name="mlflow")

    monkeypatch.setattr(CSVLogger, "__init__", fails)
    with pytest.raises(UserError, match=r"logger\.x: .* cannot be made: No module named 'mlflow'") as error:
        make_objects({"x": {"_target_": f"{LOGGERS}.CSVLogger"}}, "logger", save_dir=".")
    assert error.value.fix == "Install it: pip install mlflow"


def test_13_device_stats_work_without_psutil(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That a training with them runs: tests/training/test_callbacks.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lightning_callbacks, "_is_installed", lambda *names: False)
    (tmp_path / "text.txt").write_text("one two three. " * 2000, encoding="utf-8")
    check = ["train", "experiment=tiny", "stage=base", "check_only=true", "data=local", "data.path=text.txt"]
    check += ["callbacks=device_stats", "paths.cache=c"]
    assert main(check) == 0
    assert main([*check, "callbacks.device_stats.cpu_stats=true"]) == 2
    assert "needs psutil: pip install psutil" in capsys.readouterr().err
