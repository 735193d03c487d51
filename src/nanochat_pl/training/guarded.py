"""Loggers and callbacks of others: one that fails in the middle of a training is left out from there on.

They write down what happens, on the disk or to a service; that one cannot do so is no reason to lose a run. What a
person asked of them is said not to be done, once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import Logger

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.distributed import collectives
from nanochat_pl.training.callbacks.graceful_stop import StopRequested

_OF_LOGGERS = (
    *("log_metrics", "log_hyperparams", "log_graph", "log_image", "log_text", "log_table", "log_audio", "log_video"),
    *("save", "finalize", "after_save_checkpoint"),
)
_LONGEST = 200  # characters of what an error says


def guard_loggers(loggers: Sequence[Logger]) -> Sequence[Logger]:
    """Start loggers, and let each be left out when it fails later.

    Raises:
        UserError: one cannot be started, which is known before anything is trained.
    """
    for logger in loggers:
        try:
            _ = logger.experiment  # type: ignore[attr-defined]  # what opens a file or a connection
        except Exception as error:
            raise UserError(f"logger: {type(logger).__name__} cannot be started: {_words(error)}") from error
        _guard(logger, [name for name in _OF_LOGGERS if callable(getattr(logger, name, None))])
    return loggers


def guard_callbacks(callbacks: Sequence[Callback]) -> Sequence[Callback]:
    """Let each callback be left out when a hook of it fails; of several processes all must do the same, so there an
    error ends the training."""
    if collectives.world_size() == 1:
        for callback in callbacks:
            _guard(callback, [name for name in dir(callback) if name.startswith("on_")])
    return callbacks


def _guard(guarded: Any, names: Sequence[str]) -> None:
    """Replace methods of an object by ones that do the same until the first of them fails, and then nothing."""
    failed: list[str] = []

    def guard(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any, **keywords: Any) -> Any:
            if failed:
                return None
            try:
                return method(*arguments, **keywords)
            except (UserError, StopRequested):
                raise
            except Exception as error:
                failed.append(name)
                rank_zero_print(
                    f"{type(guarded).__name__} fails in {name} and is left out from here on; the training goes on."
                    f" {_words(error)}"
                )
                return None

        return call

    for name in names:
        setattr(guarded, name, guard(name, getattr(guarded, name)))


def _words(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
