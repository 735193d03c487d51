"""Lightning's own callbacks beside a stage that does its own steps: each works, or is refused at the start."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as stock
import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanochat_pl import load_bundle
from nanochat_pl.cli.main import main
from nanochat_pl.config.instantiate import problems_of_objects
from nanochat_pl.optim.schedules import ScheduleSettings, schedule_values
from nanochat_pl.training.callbacks.graceful_stop import StopRequested
from nanochat_pl.training.lightning_callbacks import MEASURED, REFUSED, WORKING, why_refused
from tests.helpers.launch import launch
from tests.helpers.training import fit_tiny
from tests.training.conftest import same_weights, tiny_overrides, weights_of

EARLY = "lightning.pytorch.callbacks.EarlyStopping"


def test_each_of_lightnings_callbacks_works_or_is_refused() -> None:
    """A new version of Lightning brings new ones: try them."""
    assert set(stock.__all__) == WORKING | set(REFUSED)
    assert not WORKING & set(REFUSED)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_at_the_start_with_the_reason(name: str) -> None:
    (problem,) = problems_of_objects({"x": {"_target_": f"lightning.pytorch.callbacks.{name}"}}, "callbacks")
    assert problem.startswith(f"callbacks.x: Lightning's {name} does not work here: ")
    inherits = type("Mine", (getattr(stock, name),), {})
    assert f"Lightning's {name}" in str(why_refused(inherits, {}))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"monitor": "val/bpb"}, None),
        ({"monitor": "val/bpb_wiki", "check_on_train_epoch_end": None}, None),
        ({"monitor": "val/bbp"}, ".monitor=val/bbp: is not measured; did you mean val/bpb"),
        ({"monitor": "train/loss"}, ".monitor=train/loss: is not measured; did you mean val/loss?"),
        ({}, ".monitor=None: is not measured"),
        ({"monitor": "val/bpb", "check_on_train_epoch_end": True}, ".check_on_train_epoch_end=true: "),
    ],
)
def test_early_stopping_that_would_never_stop_is_refused(arguments: dict[str, Any], said: str | None) -> None:
    answer = why_refused(stock.EarlyStopping, arguments)
    assert answer is None if said is None else str(answer).startswith(said)


def test_what_can_be_monitored_is_what_validation_measures(place: Path) -> None:
    finished = json.loads((place / "runs" / "whole" / "base" / "finished.json").read_text(encoding="utf-8"))
    assert set(finished["metrics"]) == set(MEASURED)


def test_those_that_work_do_their_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[int] = []

    def summarize(summary_data: Any, total_parameters: int, *args: Any, **kwargs: Any) -> None:
        tables.append(total_parameters)

    for summary in (stock.ModelSummary, stock.RichModelSummary):
        monkeypatch.setattr(summary, "summarize", staticmethod(summarize))
    timer = stock.Timer(duration="00:00:10:00")
    callbacks = [
        Callback(),
        stock.ModelSummary(),
        stock.RichModelSummary(),
        stock.LearningRateMonitor("step", log_momentum=True, log_weight_decay=True),
        stock.DeviceStatsMonitor(cpu_stats=False),
        stock.EarlyStopping("val/bpb", patience=100),
        timer,
    ]
    assert {type(each).__name__ for each in callbacks} == WORKING
    logger = TensorBoardLogger(str(tmp_path), name="tensorboard", version="")
    stage = fit_tiny(tmp_path, num_steps=4, every_steps=2, loggers=[logger], callbacks=callbacks)
    assert stage.net is not None and tables == [sum(p.numel() for p in stage.net.parameters())] * 2
    assert timer.time_elapsed() > 0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rates = [tag for tag in events.Tags()["scalars"] if tag.startswith("lr-MuonAdamW")]
    groups = stage.trainer.optimizers[0].param_groups
    names = {tag.split("/")[-1].split("-")[0]: tag for tag in rates if "momentum" not in tag and "decay" not in tag}
    assert len(names) == len(groups)
    # A rate is logged before a step, so it is that of the step before.
    multipliers = [schedule_values(ScheduleSettings(warmup_steps=2), step, 4).lr_multiplier for step in range(3)]
    for group in groups:
        values = [event.value for event in events.Scalars(names[group["name"]])][1:]
        last = float(group["lr"]) / schedule_values(ScheduleSettings(warmup_steps=2), 3, 4).lr_multiplier
        assert values == pytest.approx([last * multiplier for multiplier in multipliers], rel=1e-5)


def early_stopping(folder: Path, patience: int = 2) -> str:
    """An experiment whose base stage no validation is good enough for."""
    path = folder / "early.yaml"
    node = f"{{_target_: {EARLY}, monitor: val/bpb, patience: {patience}, min_delta: 10.0}}"
    path.write_text(f"stages: {{base: {{callbacks.early: {node}}}}}\n", encoding="utf-8")
    return f"experiment={path}"


def begun(place: Path, run: str) -> Path:
    shutil.copytree(place / "runs" / "whole" / "tokenizer", place / "runs" / run / "tokenizer")
    return place / "runs" / run


def finished_step(run: Path) -> int:
    return int(json.loads((run / "base" / "finished.json").read_text(encoding="utf-8"))["step"])


def unfinish(run: Path, last_step: int) -> None:
    """As if the run had been killed with this newest resume file."""
    shutil.rmtree(run / "base" / "bundle")
    (run / "base" / "finished.json").unlink()
    for path in (run / "base" / "checkpoints").glob("*.ckpt"):
        if int(path.stem.split("=")[1]) > last_step:
            path.unlink()


def test_early_stopping_finishes_the_stage_where_it_stands(
    place: Path, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It never fired: Lightning asks it after a validation loop that does not run here."""
    run, settings = begun(place, "early"), ["run=early", "evaluation.every_steps=5", early_stopping(tmp_path)]
    assert train(*settings) == 0
    assert "a callback ended the training after step 15 of 40." in capsys.readouterr().out
    assert finished_step(run) == 15 and load_bundle(run / "base" / "bundle", dtype="float32").stage.step == 15
    assert (run / "base" / "metrics.csv").read_text(encoding="utf-8").splitlines()[-1].startswith("15,")
    samples = (run / "base" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["step"] for line in samples} == {15}
    assert train(*settings) == 0
    assert "is finished" in capsys.readouterr().out
    assert main(["report", "run=early", f"paths.runs={place / 'runs'}"]) == 0
    report = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
    assert report["stages"]["base"]["step"] == 15
    whole = weights_of(run, "base")
    for last in (10, 15):  # 15: killed between its last step and its bundle
        unfinish(run, last)
        assert train(*settings) == 0
        assert finished_step(run) == 15, f"its patience was forgotten at step {last}"
        assert same_weights(weights_of(run, "base"), whole)


class Seen(Callback):
    """Notes what is told after each validation; stops the training at the begin of a step, as a signal does."""

    def __init__(self, stop_before: int | None = None) -> None:
        self.validated: list[int] = []
        self.hooks: list[str] = []
        self.stop_before = stop_before

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.hooks.append("start")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.hooks.append("epoch end")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        assert set(MEASURED) <= set(trainer.callback_metrics)
        self.validated.append(trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 == self.stop_before:
            raise StopRequested(signal.SIGTERM, trainer.global_step)


def test_a_validation_is_not_counted_twice(tmp_path: Path) -> None:
    """A run stopped after a validation measured it again when it went on: EarlyStopping lost patience too early."""
    seen = Seen(stop_before=5)
    with pytest.raises(StopRequested):
        fit_tiny(tmp_path, num_steps=8, every_steps=2, checkpoint_every_steps=100, callbacks=[seen])
    assert seen.validated == [2, 4] and seen.hooks == ["start", "epoch end"] * 2
    assert (tmp_path / "checkpoints" / "step=000004.ckpt").exists()
    again = Seen()
    fit_tiny(tmp_path, num_steps=8, every_steps=2, checkpoint_every_steps=100, callbacks=[again])
    assert again.validated == [6]


@pytest.mark.slow
def test_on_two_processes_both_end_at_the_same_step(place: Path) -> None:
    """And one of them speaks."""
    run = begun(place, "early-on-two")
    early = ["callbacks=[early_stopping,model_summary]", "callbacks.early_stopping.patience=2"]
    keys = ["evaluation.every_steps=5", "callbacks.early_stopping.min_delta=10.0", "trainer.profiler=simple"]
    done = launch(2, ["train", "run=early-on-two", *tiny_overrides(place), *early, *keys])
    assert done.returncode == 0, done.stderr
    assert finished_step(run) == 15 and done.stdout.count("after step 15 of 40") == 1
    assert (done.stdout + done.stderr).count("Trainable params") == 1


def test_a_package_that_a_callback_lacks_is_said_before_anything_is_prepared(
    place: Path, train: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped choice ran on no CPU without psutil, and said so when all was prepared."""
    monkeypatch.setattr("nanochat_pl.training.lightning_callbacks._is_installed", lambda *names: False)
    begun(place, "device-stats")
    assert train("run=device-stats", "callbacks=[device_stats]", "logger=[tensorboard]", "max_steps=2") == 0
    begun(place, "cpu-stats")
    keys = ["callbacks=[device_stats]", "callbacks.device_stats.cpu_stats=null", "check_only=true"]
    assert train("run=cpu-stats", *keys) == 2
    assert "error: callbacks.device_stats: what it says of a CPU needs psutil: pip install psutil" in (
        capsys.readouterr().err
    )
