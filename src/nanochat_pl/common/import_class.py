"""Classes that a user names, ``package.module.Class``: of any package, or of a module in the current folder."""

from __future__ import annotations

import importlib
import inspect
import sys

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
    module, _, name = target.rpartition(".")
    if name and module.rpartition(".")[2] == "__main__":
        raise UserError(f"{key}={target!r}: cannot be imported: it is a program")
    with user_code(f"{key}={target[:200]!r}: cannot be imported"):
        if "" not in sys.path:
            sys.path.append("")  # the current folder, which python -m has first
        found = getattr(importlib.import_module(module), name, None)
    if not inspect.isclass(found) or inspect.isabstract(found):
        abstract = " to make objects of: it is abstract" if inspect.isclass(found) else ""
        raise UserError(f"{key}={target!r}: there is no such class{abstract}.")
    return found
