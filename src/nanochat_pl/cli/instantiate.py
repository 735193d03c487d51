"""Objects named by ``_target_`` in a config file: loggers and callbacks, from an allow-list of packages.

Only configuration files may name a class (the command line and everything read from a run or a bundle may not), and
only one of these packages, so that a copied experiment file cannot run an arbitrary function of the standard library.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from nanochat_pl.common.errors import UserError, did_you_mean

ALLOWED_PACKAGES = ("nanochat_pl", "lightning", "torchmetrics")


def instantiate_allowed(
    node: Mapping[str, Any], where: str, allowed: tuple[str, ...] = ALLOWED_PACKAGES, **more: Any
) -> Any:
    """Make the object that ``_target_`` names, with the node's other keys as arguments.

    Args:
        node: ``{"_target_": "package.module.Class", …}`` as plain data.
        where: the node's key, for messages.
        allowed: top-level packages that may be named.
        more: arguments given by the program.

    Raises:
        UserError: no such class, a package that is not allowed, or arguments that it does not take.
    """
    target = node.get("_target_")
    arguments = {key: value for key, value in node.items() if key != "_target_"} | more
    if not isinstance(target, str) or "." not in target:
        raise UserError(f"{where}: has no _target_, the dotted name of a class.")
    if target.split(".")[0] not in allowed:
        raise UserError(
            f"{where}._target_={target!r}: only classes of {', '.join(allowed)} are made from configuration.",
        )
    made = _find_class(target, where)
    known = inspect.signature(made).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    wrong = [] if takes_any else [key for key in arguments if key not in known]
    if wrong:
        raise UserError(
            [f"{where}.{key}: {target} takes no such argument; {did_you_mean(key, known)}" for key in wrong]
        )
    try:
        return made(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {target} cannot be made: {error}") from error


def _find_class(target: str, where: str) -> type:
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UserError(f"{where}._target_={target!r}: cannot be imported: {error}") from error
    if not inspect.isclass(found):
        raise UserError(f"{where}._target_={target!r}: there is no such class.")
    return found
