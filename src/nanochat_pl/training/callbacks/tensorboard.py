"""What TensorBoard shows of a run besides curves, and what becomes of its event files when a run goes on.

The files are only ever written on, so what is void after a stop is marked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard import SummaryWriter

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import first_line

# The tab "Custom scalars": charts of several curves each. Tags are regular expressions.
LAYOUT: dict[str, dict[str, tuple[str, list[str]]]] = {
    "Learning": {
        "loss": ("Multiline", ["train/loss", "train/loss_smoothed", "val/loss"]),
        "validation, bits per byte": ("Multiline", ["val/bpb", "val/bpb_(?!stderr).*"]),
        "reward": ("Multiline", ["reward", "reward/.*"]),
        "pass@k": ("Multiline", ["pass_at_[0-9]+/.*"]),
        "tasks": ("Multiline", ["chat/.*", "core/mean"]),
    },
    "Optimizer": {
        "schedule": ("Multiline", ["train/lr_multiplier", "train/muon_momentum", "train/muon_weight_decay"]),
        "gradient norm": ("Multiline", ["train/gradient_norm", "gradient_norm/.*"]),
        "weight norm": ("Multiline", ["weight_norm/.*"]),
        "update to weight": ("Multiline", ["update_ratio/.*"]),
    },
    "Machine": {
        "tokens per second": ("Multiline", ["train/tokens_per_second"]),
        "MFU": ("Multiline", ["train/mfu"]),
        "memory": ("Multiline", [".*memory.*"]),
        "seconds": ("Multiline", ["train/step_seconds", "train/communication_seconds"]),
    },
}


def show_layout(loggers: Iterable[Logger], metrics: Collection[str]) -> None:
    """Arrange the curves in TensorBoard's tab "Custom scalars": of each chart some of the metrics are there."""
    charts = {
        title: {
            name: [kind, tags]
            for name, (kind, tags) in group.items()
            if any(re.fullmatch(tag, metric) for tag in tags for metric in metrics)
        }
        for title, group in LAYOUT.items()
    }
    _write(loggers, lambda writer: writer.add_custom_scalars(charts))


def show_text(loggers: Iterable[object], tag: str, markdown: str, step: int) -> None:
    """Show a text in TensorBoard's tab "Text"."""
    _write(loggers, lambda writer: writer.add_text(tag, markdown, step))


def show_samples(loggers: Iterable[Logger], samples: Sequence[Mapping[str, Any]], step: int) -> None:
    """Show what the model wrote, as it is: a fence keeps it from being taken for Markdown."""
    blocks = [f"{_fenced(str(each['prompt']))}\n{_fenced(str(each['text']))}" for each in samples]
    show_text(loggers, "samples", "\n\n---\n\n".join(blocks), step)


def show_tasks(loggers: Iterable[Logger], name: str, metrics: Mapping[str, float], step: int) -> None:
    """Show the metrics of a benchmark as a table."""
    rows = "\n".join(f"| {key.removeprefix(f'{name}/')} | {value:.4f} |" for key, value in metrics.items())
    show_text(loggers, f"tasks/{name}", f"| {name} | |\n|---|---:|\n{rows}", step)


def show_outcome(loggers: Iterable[Logger], settings: Mapping[str, str], metrics: Mapping[str, float]) -> None:
    """Give the tab "HParams" a row: the settings that were given, and what the stage came to."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(dict(settings), {f"final/{name}": value for name, value in metrics.items()})


def _write(loggers: Iterable[object], write: Callable[[SummaryWriter], None]) -> None:
    """Write to each logger of TensorBoard. That one cannot is no reason to end a training."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            try:
                write(logger.experiment)
            except (OSError, RuntimeError, ValueError) as error:
                rank_zero_print(f"{logger.log_dir}: cannot be written: {first_line(error)}")


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


class RewindEvents(Callback):
    """Rewinds the event files of a run that goes on, once it is known what of its step is measured again.

    Args:
        loggers: as of :func:`rewind_events`.
        step: optimizer steps that the resume file has.
        metrics: of that step, as metrics.csv has them.
        is_measured_again: whether a metric will be logged at that step once more; asked when the other callbacks have
            their states back.
    """

    def __init__(
        self,
        loggers: Iterable[Logger],
        step: int,
        metrics: Mapping[str, float],
        is_measured_again: Callable[[str], bool],
        names: Collection[str],
    ) -> None:
        self.loggers, self.step, self.metrics = loggers, step, metrics
        self.is_measured_again, self.names = is_measured_again, names

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before anything is logged."""
        kept = {name: value for name, value in self.metrics.items() if not self.is_measured_again(name)}
        if self.step == 0:
            show_layout(self.loggers, self.names)
        rewind_events(self.loggers, self.step, kept)


def rewind_events(loggers: Iterable[Logger], step: int, metrics: Mapping[str, float]) -> None:
    """Let no step stand in the event files twice when a run goes on after ``step``.

    A mark tells readers to forget what was written of ``step`` and of those after it.

    Args:
        loggers: those of TensorBoard are looked after.
        step: optimizer steps that the resume file has.
        metrics: of that step, in so far as they will not be measured again: they are written again.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            writer = logger.experiment.file_writer
            writer.add_event(Event(step=step, file_version="brain.Event:2"))
            writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
            logger.log_metrics(dict(metrics), step)
