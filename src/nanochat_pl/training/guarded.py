"""Loggers, callbacks and modules of others: what they raise is said with their class and method.

Loggers and callbacks write down what happens, on the disk or to a service; that one cannot do so is no reason to lose a
run. So one that fails in the middle of a training is left out from there on; what a person asked of it is said not to
be done, once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import Logger

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.out_of_memory import is_out_of_memory
from nanochat_pl.common.user_code import UserCodeError, user_code
from nanochat_pl.distributed import collectives
from nanochat_pl.optim.muon_adamw import MuonAdamW
from nanochat_pl.training.callbacks.graceful_stop import StopRequested
from nanochat_pl.training.module import LMModule

_OF_LOGGERS = (
    *("log_metrics", "log_hyperparams", "log_graph", "log_image", "log_text", "log_table", "log_audio", "log_video"),
    *("save", "finalize", "after_save_checkpoint"),
)
_OF_STEP = ("loss", "gradient_norm", "num_targets", "row_losses", "skipped")  # what a training step gives


def guard_loggers(loggers: Mapping[str, Logger]) -> list[Logger]:
    """Start loggers, by their keys, and let each be left out when it fails later.

    Raises:
        UserError: one cannot be started, which is known before anything is trained.
    """
    for key, logger in loggers.items():
        with user_code(f"{key}: {type(logger).__name__} cannot be started"):
            _ = getattr(logger, "experiment", None)  # what opens a file or a connection, where it has one
        _guard(key, logger, [name for name in _OF_LOGGERS if callable(getattr(logger, name, None))])
    return list(loggers.values())


def guard_callbacks(callbacks: Mapping[str, Callback]) -> list[Callback]:
    """Let each callback, by its key, be left out when a hook of it fails, but for ``setup``: nothing is trained before.

    Of several processes all must do the same, so there an error ends the training.
    """
    hooks = ("setup", "state_dict", "load_state_dict")
    of_lightning = [name for name in dir(Callback) if name.startswith("on_") or name in hooks]
    for key, callback in callbacks.items():
        names = [name for name in of_lightning if callable(getattr(callback, name))]
        alone = collectives.world_size() == 1
        _guard(key, callback, names, fatal=["setup"] if alone else names)
        # By itself: also of one that is left out it closes what setup opened.
        _guard(key, callback, ["teardown"], fatal=[] if alone else ["teardown"])
    return list(callbacks.values())


def guard_module(stage: LMModule) -> LMModule:
    """Name the class where a method that a subclass of LMModule has of its own raises, or a step gives nothing.

    Memory that runs out stays what it is: the step is done again with fewer rows.
    """
    where = f"stage.module={_name(stage)}"

    def guard(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any, **keywords: Any) -> Any:
            with user_code(f"{where} fails in {name}", lambda error: _is_stop(error) or _ran_out(error)):
                given = method(*arguments, **keywords)
            there = given if isinstance(given, Mapping) else ()
            if name == "training_step" and (missing := [key for key in _OF_STEP if key not in there]):
                raise UserCodeError(
                    f"{where}: training_step gives {type(given).__name__} without {', '.join(missing)}.",
                    "Give what LMModule.training_step does; you may add to it.",
                )
            if name == "configure_optimizers" and not isinstance(given, MuonAdamW):
                raise UserCodeError(
                    f"{where}: configure_optimizers gives {type(given).__name__}, no subclass of MuonAdamW.",
                    "The step calls methods that other optimizers lack: docs/lightning.md says which.",
                )
            return given

        return call

    own = {name for cls in type(stage).__mro__ if not issubclass(LMModule, cls) for name in vars(cls)}
    for name in own:
        if not name.startswith("__") and callable(getattr(LMModule, name, None)):
            setattr(stage, name, guard(name, getattr(stage, name)))
    return stage


def _guard(key: str, guarded: Any, names: Sequence[str], fatal: Sequence[str] = ()) -> None:
    """Replace methods of an object by ones that do the same until the first of them fails, and then nothing.

    Of those that are ``fatal`` an error is raised, with the key and the class.
    """
    failed: list[str] = []

    def guard(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any, **keywords: Any) -> Any:
            if failed:
                return None
            words = f"{key}: {_name(guarded)} fails in {name}"
            if name not in fatal:
                words += " and is left out from here on; the training goes on"
            try:
                with user_code(words, _is_stop):
                    return method(*arguments, **keywords)
            except UserCodeError as error:
                if name in fatal:
                    raise
                failed.append(name)
                rank_zero_print(error.in_one_line)
                return None

        return call

    for name in names:
        setattr(guarded, name, guard(name, getattr(guarded, name)))


def _is_stop(error: BaseException) -> bool:
    return isinstance(error, StopRequested)


def _ran_out(error: BaseException) -> bool:
    return isinstance(error, (RuntimeError, MemoryError)) and is_out_of_memory(error)


def _name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
