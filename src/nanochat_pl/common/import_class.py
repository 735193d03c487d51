"""Classes and functions that a user names, ``package.module.name``: of a package, or a module in the current folder."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.user_code import user_code


def import_class(target: str, key: str) -> type:
    """Import a class; a function or a constant is none, and nothing is called.

    Args:
        target: its dotted name, which a user typed or wrote into a config file; never read from a bundle or a run.
        key: of the settings, for messages.

    Raises:
        UserError: there is no such class, or importing it fails.
    """
    found = _imported(target, key)
    if not inspect.isclass(found) or inspect.isabstract(found):
        abstract = " to make objects of: it is abstract" if inspect.isclass(found) else ""
        raise UserError(f"{key}={target!r}: there is no such class{abstract}.")
    return found


def import_callable(target: str, key: str) -> Callable[..., Any]:
    """Import a class or a function; nothing is called. Arguments and errors are those of :func:`import_class`."""
    found = _imported(target, key)
    if not callable(found):
        raise UserError(f"{key}={target!r}: there is no such class or function.")
    return found


def _imported(target: str, key: str) -> Any:
    """What a module has under a name; None: nothing."""
    module, _, name = target.rpartition(".")
    if name and module.rpartition(".")[2] == "__main__":
        raise UserError(f"{key}={target!r}: cannot be imported: it is a program")
    with user_code(f"{key}={target[:200]!r}: cannot be imported"):
        if "" not in sys.path:
            sys.path.append("")  # the current folder, which python -m has first
        return getattr(importlib.import_module(module), name, None)
