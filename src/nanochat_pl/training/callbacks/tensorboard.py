"""TensorBoard's event files of a run that was stopped: they are only ever written on, so what is void is marked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog


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
    ) -> None:
        self.loggers, self.step, self.metrics = loggers, step, metrics
        self.is_measured_again = is_measured_again

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before anything is logged."""
        kept = {name: value for name, value in self.metrics.items() if not self.is_measured_again(name)}
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
