"""Classes of the user's, which settings name: what they raise is said with the key, the class and the place."""

from __future__ import annotations

import contextlib
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from nanochat_pl.common.errors import LostContact, UserError

_LONGEST = 200  # characters of what an error says
_PACKAGE, _PYTHON = str(Path(__file__).parents[1]), sysconfig.get_path("stdlib")


class UserCodeError(UserError):
    """What code of the user's has raised."""


@contextlib.contextmanager
def user_code(said: str, passes: Callable[[BaseException], bool] = lambda error: False) -> Iterator[None]:
    """Turn whatever is raised inside into a :class:`UserCodeError`: also ``sys.exit()``, which would end the command as
    if all were done. What is meant for people passes, and so does a Ctrl-C.

    Args:
        said: what stands in front of the error: the key, the class and what it fails in.
        passes: says of which further exceptions that they stay what they are.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, (UserError, LostContact, KeyboardInterrupt, GeneratorExit)) or passes(error):
            raise
        raise UserCodeError(f"{said}: {_words(error)}", _place(error)) from error


def _words(error: BaseException) -> str:
    """An error in one line; what an import lacks says it all."""
    kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
    text = " ".join(f"{kind}{error}".split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _place(error: BaseException) -> str:
    """Where in the user's own files it was raised, or what raised it was called; empty: it was not in them."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_PACKAGE, _PYTHON, "<")) and "site-packages" not in frame.filename
    ]
    return f"It comes from {frames[-1].filename}, line {frames[-1].lineno} ({frames[-1].name})." if frames else ""
