"""Bugs around the loop: counting, averages, stalls, compilers and what a resumed run writes. Real fits of Lightning."""

from __future__ import annotations

import csv
import gc
import math
import signal
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.progress import Progress
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from nanochat_pl.common.console import console
from nanochat_pl.optim.schedules import ScheduleSettings, schedule_values
from nanochat_pl.training.callbacks import gc as garbage
from nanochat_pl.training.callbacks import progress
from nanochat_pl.training.callbacks.graceful_stop import StopRequested
from nanochat_pl.training.callbacks.metrics import SMOOTHING
from tests.helpers.training import fit_tiny
from tests.regressions.conftest import CountingCompiler


def metrics_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def stop_after(folder: Path, step: int) -> None:
    """Make a finished fit one that was killed, with ``step`` in its newest resume file and metrics of later steps."""
    for path in (folder / "checkpoints").iterdir():
        if int(path.stem.split("=")[1]) > step:
            path.unlink()


def assert_figures_are_right(folder: Path, num_steps: int) -> None:
    rows = metrics_of(folder)
    assert [int(row["step"]) for row in rows] == list(range(1, num_steps + 1))
    losses = [float(row["train/loss"]) for row in rows]
    assert losses[0] == pytest.approx(math.log(265), abs=0.05)  # of the first weights, which know nothing
    for number, row in enumerate(rows):
        values = schedule_values(ScheduleSettings(warmup_steps=2), number, num_steps)
        assert float(row["train/lr_multiplier"]) == pytest.approx(values.lr_multiplier)
        weights = [SMOOTHING ** (number - i) for i in range(number + 1)]
        average = sum(w * loss for w, loss in zip(weights, losses, strict=False)) / sum(weights)
        assert float(row["train/loss_smoothed"]) == pytest.approx(average, rel=1e-6)
        assert int(row["train/tokens"]) == (number + 1) * 4 * 16


def test_figures_and_loss_average_are_those_of_their_step(tmp_path: Path) -> None:
    """The average's correction for its start was off by one step, and the first or last step was not counted."""
    fit_tiny(tmp_path, num_steps=5, checkpoint_every_steps=3)
    assert_figures_are_right(tmp_path, num_steps=5)
    whole = metrics_of(tmp_path)
    stop_after(tmp_path, 3)
    fit_tiny(tmp_path, num_steps=5, checkpoint_every_steps=3)
    assert_figures_are_right(tmp_path, num_steps=5)
    assert [row["train/loss"] for row in metrics_of(tmp_path)] == [row["train/loss"] for row in whole]


def test_the_bar_stands_where_the_training_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar began at 0 after a resume and never reached its end."""
    shown: list[tuple[float, str]] = []

    def update(self: Progress, task: Any, **fields: Any) -> None:
        if "completed" in fields:
            shown.append((fields["completed"], fields["steps"]))

    terminal = console(stderr=True)
    monkeypatch.setattr(type(terminal), "is_terminal", True)
    monkeypatch.setattr(progress, "console", lambda stderr: terminal)
    monkeypatch.setattr(Progress, "update", update)
    monkeypatch.setattr(Progress, "start", lambda self: None)
    whole = [(0, "0/3"), (0.5, "0/3"), (1, "1/3"), (1.5, "1/3"), (2, "2/3"), (2.5, "2/3"), (3, "3/3")]
    fit_tiny(tmp_path, num_steps=3)
    assert shown == whole
    stop_after(tmp_path, 2)
    shown.clear()
    fit_tiny(tmp_path, num_steps=3)
    assert shown == whole[4:]


def test_an_event_file_has_each_step_once_after_a_kill(tmp_path: Path) -> None:
    """TensorBoard showed the steps between the last resume file and the kill twice."""

    def fit_with_events() -> None:
        logger = TensorBoardLogger(str(tmp_path), name="tensorboard", version="")
        fit_tiny(tmp_path, num_steps=5, every_steps=2, checkpoint_every_steps=2, loggers=[logger])

    def scalars() -> dict[str, list[tuple[int, float]]]:
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        return {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in ("train/loss", "train/loss_smoothed", "train/tokens", "val/bpb")
        }

    fit_with_events()
    whole = scalars()
    assert [step for step, _ in whole["train/loss"]] == [1, 2, 3, 4, 5]
    assert [step for step, _ in whole["val/bpb"]] == [2, 4]
    for step in (2, 0):  # 0: it was killed before its first resume file and starts over
        stop_after(tmp_path, step)
        fit_with_events()
        assert scalars() == whole


class StopAfter(Callback):
    """Stops as a signal does: once the step is made and what is due after it is measured."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise StopRequested(signal.SIGINT, self.step)


@pytest.mark.parametrize(
    ("stop_after_step", "files_every"),
    [
        pytest.param(step, every, marks=() if (step, every) in ((2, 2), (4, 100)) else pytest.mark.slow)
        for step in (1, 2, 4)
        for every in (1, 2, 100)
    ],
)
def test_event_files_and_metrics_hold_the_same_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after_step: int, files_every: int
) -> None:
    """The validation of the step that a stop had its resume file of stood in metrics.csv alone."""
    # Files of one second are read in the order of this number as text, and several runs of this process had some.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))

    def fit_with_events(*callbacks: Callback) -> None:
        logger = TensorBoardLogger(str(tmp_path), name="tensorboard", version="")
        settings = {"every_steps": 2, "checkpoint_every_steps": files_every}
        fit_tiny(tmp_path, num_steps=5, loggers=[logger], callbacks=callbacks, **settings)

    with pytest.raises(StopRequested):
        fit_with_events(StopAfter(stop_after_step))
    fit_with_events()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = metrics_of(tmp_path)
    for tag in ("train/loss", "train/tokens", "val/bpb", "val/bpb_stderr"):
        logged = [(event.step, event.value) for event in events.Scalars(tag)]
        written = [(int(row["step"]), float(np.float32(row[tag]))) for row in rows if row[tag]]
        assert logged == written, tag


class Litter(Callback):
    """Leaves more garbage in every step than Python lets lie, and notes in which steps it is collected."""

    def __init__(self, break_off_after: int | None = None) -> None:
        self.break_off_after = break_off_after
        self.step: int | None = None  # none before the first step and after the last: there Python does as it likes
        self.collected_in: list[int] = []
        self.rings: list[weakref.ref[Litter]] = []
        self.num_left: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.step = trainer.global_step + 1
        self.num_left.append(sum(ring() is not None for ring in self.rings))
        for _ in range(3_000):
            ring: Any = Litter()
            ring.itself = ring
        self.rings.append(weakref.ref(ring))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.break_off_after:
            raise RuntimeError("break off")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.step = None

    def note(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start" and self.step is not None:
            self.collected_in.append(self.step)


@pytest.mark.usefixtures("collector")
def test_garbage_is_collected_at_chosen_steps_and_at_no_other_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's collector went through every object of the process in the middle of steps: stalls of half a second."""
    monkeypatch.setattr(garbage, "COLLECT_EVERY_STEPS", 3)
    litter = Litter()
    given_back: list[int | None] = []
    monkeypatch.setattr(garbage, "keep_freed_memory", lambda: given_back.append(litter.step))
    gc.callbacks.append(litter.note)
    try:
        fit_tiny(tmp_path, num_steps=7, callbacks=[litter])
    finally:
        gc.callbacks.remove(litter.note)
    assert litter.collected_in == given_back == [1, 3, 6]
    assert litter.num_left == [0, 0, 1, 0, 1, 2, 0]
    assert gc.isenabled() and gc.get_freeze_count() == 0


@pytest.mark.usefixtures("collector")
def test_a_training_that_breaks_off_gives_the_collector_back(tmp_path: Path) -> None:
    """A process that went on after a failed training collected no garbage any more, until its memory was full."""
    with pytest.raises(RuntimeError, match="break off"):
        fit_tiny(tmp_path, num_steps=3, callbacks=[Litter(break_off_after=2)])
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_neither_evaluation_nor_sampling_nor_a_changing_learning_rate_compiles_again(
    tmp_path: Path, compiler: CountingCompiler
) -> None:
    """Other shapes, no_grad, inference_mode, eval and a cache each cost a new graph, minutes each on a large model.
    A learning rate passed as a float is compiled in as a constant: the ninth value ended the run."""
    graphs_after_step = GraphsAfterStep(compiler)
    fit_tiny(tmp_path, num_steps=12, compiled=True, every_steps=4, callbacks=[graphs_after_step])
    samples = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert len(metrics_of(tmp_path)) == 12 and samples.count("\n") == 4
    for name in ("train/lr_multiplier", "train/muon_momentum", "train/muon_weight_decay"):
        assert len({row[name] for row in metrics_of(tmp_path)}) >= 9, name
    assert graphs_after_step.counts == [graphs_after_step.counts[0]] * 12


class GraphsAfterStep(Callback):
    """Graphs compiled so far, after each step."""

    def __init__(self, compiler: CountingCompiler) -> None:
        self.compiler = compiler
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.compiler.num_graphs > 1, "nothing was compiled"
        self.counts.append(self.compiler.num_graphs)
