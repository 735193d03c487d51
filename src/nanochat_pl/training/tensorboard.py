"""TensorBoard's event files of a run that was stopped: they are only ever written on, so what is void is marked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog


def rewind_events(loggers: Iterable[Logger], step: int, figures: Mapping[str, float]) -> None:
    """Let no step stand in the event files twice when a run goes on after ``step``.

    A mark tells readers to forget what was written of ``step`` and of those after it.

    Args:
        loggers: those of TensorBoard are looked after.
        step: optimizer steps that the resume file has.
        figures: of that step, in so far as they will not be measured again: they are written again.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            writer = logger.experiment.file_writer
            writer.add_event(Event(step=step, file_version="brain.Event:2"))
            writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
            logger.log_metrics(dict(figures), step)
