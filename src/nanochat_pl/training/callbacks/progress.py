"""The console while a stage trains: a bar in optimizer steps on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.progress import BarColumn, Progress, TextColumn

from nanochat_pl.common.console import SECONDS_BETWEEN_LINES, console, rank_zero_print
from nanochat_pl.common.launch_env import launch_env
from nanochat_pl.data.batch import StepBatch, num_micro_batches
from nanochat_pl.training.callbacks.metrics import StepMetrics


class TrainingProgress(Callback):
    """Shows step, smoothed loss, lr multiplier, time of the step, tokens a second, MFU (where the device's peak is
    known), epochs (of a mixture the fewest and the most of its sources) and ETA."""

    def __init__(self, name: str, metrics: StepMetrics) -> None:
        self.name, self.metrics = name, metrics
        self._bar: Progress | None = None
        self._task: Any = None
        self._spoken = 0.0
        self._began_at = 0
        self._parts = 1
        self._trainer: Trainer | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Show the bar where the terminal can; it begins at the step that the run goes on from."""
        self._trainer, self._spoken, self._began_at = trainer, time.monotonic(), trainer.global_step
        pl_module.micro_batch_hooks.append(self._within_step)
        if console(stderr=True).is_terminal and launch_env().rank == 0:
            first = f"first step{', compiling' if pl_module.config.compile else ''} …"
            columns = ("{task.description}", BarColumn(), "{task.fields[steps]}", TextColumn("{task.fields[metrics]}"))
            self._bar = Progress(*columns, console=console(stderr=True), refresh_per_second=4)
            self._task = self._bar.add_task(self.name, total=trainer.max_steps, steps="", metrics=first)
            self._show(trainer.global_step, trainer.global_step)
            self._bar.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: StepBatch, batch_idx: int) -> None:
        """Learn how many parts this step has."""
        self._parts = num_micro_batches(batch.num_rows or len(batch.inputs), pl_module.device_batch_size)

    def _within_step(self, part: int) -> None:
        if self._bar is not None and self._trainer is not None and part:
            self._show(self._trainer.global_step, self._trainer.global_step + part / self._parts)

    def _show(self, step: int, position: float) -> None:
        if self._bar is not None and self._trainer is not None:
            self._bar.update(self._task, completed=position, steps=f"{step:,}/{self._trainer.max_steps:,}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar, or print a line where one is due."""
        step, metrics = trainer.global_step, self._metrics(trainer)
        if self._bar is not None:
            self._bar.update(self._task, metrics=metrics)
            self._show(step, step)
        elif time.monotonic() - self._spoken >= SECONDS_BETWEEN_LINES or step == trainer.max_steps:
            self._spoken = time.monotonic()
            rank_zero_print(f"{self.name} {step:,}/{trainer.max_steps:,}  {metrics}")

    def _metrics(self, trainer: Trainer) -> str:
        latest = self.metrics.latest
        seconds_left = (trainer.max_steps - trainer.global_step) * self.metrics.seconds_per_step
        epochs = [f"{value:.2f}" for name, value in latest.items() if name.startswith("train/epochs")]
        epochs = [min(epochs, key=float), max(epochs, key=float)] if len(epochs) > 1 else epochs
        metrics = [
            self._how_it_goes(trainer),
            f"lr ×{latest['train/lr_multiplier']:.2f}",
            f"{step_time(latest['train/step_seconds'])}/step",
            f"{latest['train/tokens_per_second']:,.0f} tok/s",
            f"MFU {latest['train/mfu']:.1%}" if "train/mfu" in latest else "",
            f"epoch {'–'.join(epochs)}" if epochs else "",
            # The first step loads and compiles: it says nothing of the others.
            f"ETA {duration(seconds_left)}" if trainer.global_step > self._began_at + 1 else "",
        ]
        return "  ".join(metric for metric in metrics if metric)

    def _how_it_goes(self, trainer: Trainer) -> str:
        metric = str(trainer.lightning_module.progress_metric)
        value = self.metrics.latest.get(metric, trainer.callback_metrics.get(metric))
        name = metric.rpartition("/")[2].removesuffix("_smoothed")
        return f"{name} {float(value):.3f}" if value is not None else ""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Leave the full bar behind."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the terminal back before the error is printed."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def step_time(seconds: float) -> str:
    """Seconds as 12 ms, 1.34 s or 75 s."""
    return f"{1000 * seconds:.0f} ms" if seconds < 0.9995 else f"{seconds:.{0 if seconds >= 9.995 else 2}f} s"


def duration(seconds: float) -> str:
    """Seconds as 0:42, 12:05 or 3:07:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
