"""Run host-side work on rank 0 only or on rank 0 first; raise one rank's UserError on every rank.

With one process each of these is a plain call, for which torch is not imported: that takes seconds, and a mistake in
the settings is said before. A :class:`UserError` on one process is raised on all of them, as a
:class:`SharedError`, so that none goes on and waits for one that is gone.
"""

from __future__ import annotations

import contextlib
import json
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from nanochat_pl.common.errors import SharedError, UserError
from nanochat_pl.common.launch_env import launch_env, name_launch

T = TypeVar("T")
# Exceptions that are passed on as they are while failures are agreed on; None: they are not.
_passed_on: tuple[type[BaseException], ...] | None = None


def begin() -> None:
    """Let the processes of this launch speak to each other. Which device each trains on is not known yet."""
    import torch

    from nanochat_pl.distributed import collectives

    collectives.start(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    name_launch(collectives.broadcast_str(uuid.uuid4().hex))


def end() -> None:
    """The end of :func:`begin`: wait for each other and part. After an error of one process, it is left out."""
    from nanochat_pl.distributed import collectives

    collectives.barrier()
    collectives.stop()


def _is_alone() -> bool:
    """Whether no other process speaks to this one: where nobody has imported torch, there is no process group."""
    if "torch" not in sys.modules:
        return True
    from nanochat_pl.distributed import collectives

    return collectives.world_size() == 1


def raise_on_all_ranks(function: Callable[[], T]) -> T:
    """Call a function that has no collectives, on all processes at once.

    Raises:
        SharedError: one of them raised a :class:`UserError`: that of the lowest rank.
    """
    result, error = None, None
    try:
        result = function()
    except UserError as raised:
        if _is_alone():
            raise
        error = raised
    except Exception as raised:
        if _passed_on is None or isinstance(raised, _passed_on):
            raise
        error = UserError(f"{type(raised).__name__}: {raised}".partition("\n")[0])
        if _is_alone():
            raise error from raised
    if _is_alone():
        return result  # type: ignore[return-value]
    from nanochat_pl.distributed import collectives

    told = "" if error is None else json.dumps({"problems": error.problems, "fix": error.fix})
    for rank, text in enumerate(collectives.all_gather_str(told)):
        if text:
            problems, fix = json.loads(text).values()
            raise SharedError([f"process {rank}: {line}" if rank else line for line in problems], fix) from error
    return result  # type: ignore[return-value]


@contextlib.contextmanager
def failures_on_all_ranks(but: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Inside, :func:`raise_on_all_ranks` takes any exception for a problem that a person can put right: for work that
    may be left undone, whatever it fails of.

    Args:
        but: exceptions that stay what they are.
    """
    global _passed_on
    before, _passed_on = _passed_on, but
    try:
        yield
    finally:
        _passed_on = before


def run_on_rank_zero(function: Callable[[], Any]) -> Any:
    """Call a function on the main process alone; all get its result, which must be plain data (JSON).

    Raises:
        SharedError: it raised a :class:`UserError`.
    """
    if _is_alone():
        return raise_on_all_ranks(function) if launch_env().rank == 0 else None
    from nanochat_pl.distributed import collectives

    result = raise_on_all_ranks(function if collectives.is_rank_zero() else lambda: None)
    return json.loads(collectives.broadcast_str(json.dumps(result)))


def rank_zero_first(function: Callable[[], T]) -> T:
    """Call a function on all processes: first on the main one, then on the first of each other node, then on the rest.

    What is made and kept on a disk is made once, and found by the others.

    Raises:
        SharedError: one of them raised a :class:`UserError`.
    """
    if _is_alone():
        return function()
    from nanochat_pl.distributed import collectives

    turn = 0 if collectives.is_rank_zero() else 1 if launch_env().local_rank == 0 else 2
    results = [raise_on_all_ranks(function if turn == each else lambda: None) for each in range(3)]
    return results[turn]  # type: ignore[return-value]


def assert_equal_across_ranks(mine: str, problem: Callable[[str], str], fix: str) -> None:
    """Hold a text against that of the main process.

    Args:
        mine: this process's.
        problem: what to say where they differ, given the main process's.
        fix: what to do then.

    Raises:
        SharedError: they differ on some process.
    """
    if _is_alone():
        return
    from nanochat_pl.distributed import collectives

    mains = collectives.broadcast_str(mine)

    def compare() -> None:
        if mine != mains:
            raise UserError(problem(mains), fix)

    raise_on_all_ranks(compare)
