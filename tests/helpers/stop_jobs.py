"""What several processes do in tests of stops and of agreement: jobs for tests.helpers.processes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from nanochat_pl.common.errors import SharedError, UserError
from nanochat_pl.distributed import collectives
from nanochat_pl.training.callbacks.graceful_stop import GracefulStop, NoMoreRows, StopRequested
from nanochat_pl.training.callbacks.weight_sync import require_same_weights


def graceful_stop() -> GracefulStop:
    """One that stands at step 3."""
    stop = GracefulStop(None)  # type: ignore[arg-type]
    stop.setup(SimpleNamespace(global_step=3), None, "fit")  # type: ignore[arg-type]
    return stop


def wait_for_rows(what: list[str]) -> list[Any]:
    """How a wait for rows ends.

    Args:
        what: of each rank, what comes after how many looks: `ready 3`, `broken 2`, `SIGTERM 4`.
    """
    kind, looks = what[collectives.rank()].split()
    stop = graceful_stop()

    def wait(check: Callable[[], None]) -> None:
        for _ in range(int(looks)):
            check()
        if kind.startswith("SIG"):
            stop.signum = getattr(signal, kind)
            check()
        if kind == "broken":
            raise UserError("texts.txt: is gone.", "Bring it back.")

    try:
        stop.wait_for(wait)
        ended: list[Any] = ["ready"]
    except NoMoreRows as error:
        ended = ["no more", *error.problems, error.fix]
    except StopRequested as error:
        ended = ["stop", error.signum, error.step]
    # Whatever it was, the collectives of all still are the same ones.
    return [*ended, collectives.all_reduce_sum(collectives.rank())]


def check_once(signals: list[int]) -> int:
    """The signal with which a process stops, given what came to each; 0: none."""
    stop = graceful_stop()
    stop.signum = signals[collectives.rank()] or None
    try:
        stop.check()
    except StopRequested as error:
        return error.signum
    return 0


def compare_weights(rank: int, dtype: str) -> list[str]:
    """What is said of weights that are the same, and of those where one process has one bit otherwise."""
    weights = {name: torch.arange(6, dtype=torch.float32).to(getattr(torch, dtype)) for name in ("first", "second")}
    require_same_weights(weights, step=1)
    if collectives.rank() == rank:
        bits = weights["second"].view(torch.int32 if dtype == "float32" else torch.int16)
        bits[4] ^= 1
    try:
        require_same_weights(weights, step=2)
    except SharedError as error:
        return list(error.problems)
    return []
