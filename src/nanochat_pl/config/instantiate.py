"""Objects named by ``_target_`` on the command line and in the user's config files: loggers and callbacks.

Any class that is a Logger or a Callback of Lightning will do, of any package, or of a module in the current folder. A
function is never called, and what is read from a bundle or a run folder is never made into objects.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.common.import_class import import_class
from nanochat_pl.common.user_code import user_code
from nanochat_pl.common.yaml_files import read_yaml
from nanochat_pl.config import config_dir
from nanochat_pl.training.lightning_callbacks import base_of, missing_package, pip_line, why_refused

if TYPE_CHECKING:
    from nanochat_pl.training.module import LMModule

# Groups of such objects, and the arguments that the program gives to each of them that takes them.
OBJECTS: dict[str, tuple[str, ...]] = {"logger": ("save_dir", "name", "id", "run_name"), "callbacks": ()}


def problems_of_objects(nodes: Any, group: str) -> list[str]:
    """What would keep the objects of a group from being made, as far as their signatures tell: a line for each."""
    if not isinstance(nodes, Mapping):
        return []  # said by the check of the settings
    problems: list[str] = []
    for name, node in nodes.items():
        if node is not None and not (group == "logger" and node == _own_default(str(name))):  # null leaves one out
            try:
                problems += _problems_of_object(node, f"{group}.{name}", group)
            except UserError as error:
                problems += error.problems
    return problems


@functools.cache
def _own_default(name: str) -> dict[str, Any] | None:
    """The node of the logger that every training has, as our own file has it: it needs no look, and to look at it
    means to import Lightning, which takes seconds."""
    path = config_dir.config_folder() / "logger" / f"{name}.yaml"
    return read_yaml(path)[name] if name == "tensorboard" else None


def make_objects(nodes: Mapping[str, Any], group: str, **given: Any) -> dict[str, Any]:
    """Make the objects of a group, each of its node ``{"_target_": "package.module.Class", …}``; by their keys.

    Args:
        nodes: plain data by name, in which :func:`problems_of_objects` found nothing.
        group: one of :data:`OBJECTS`.
        given: arguments that the program gives to the classes that take them, where the node does not.

    Raises:
        UserError: a class does not take the values of its arguments.
    """
    there = {f"{group}.{name}": node for name, node in nodes.items() if node is not None}
    return {key: _make(node, key, given) for key, node in there.items()}


def problems_of_module(target: Any) -> list[str]:
    """What is wrong with ``stage.module``: a line, or none."""
    if not isinstance(target, str):
        return []  # null, or said by the check of the settings
    from nanochat_pl.training.module import LMModule

    try:
        found = import_class(target, "stage.module")
        signature = _signature(found, f"stage.module={target!r}")
    except UserError as error:
        return list(error.problems)
    if not issubclass(found, LMModule):
        return [f"stage.module={target!r}: is no subclass of nanochat_pl.LMModule."]
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        return [f"stage.module={target!r}: is made with (config, weights, moments), as LMModule is: {error}."]
    return []


def module_class(target: str | None) -> type[LMModule]:
    """The class of ``stage.module``, in which :func:`problems_of_module` found nothing."""
    from nanochat_pl.training.module import LMModule

    return LMModule if target is None else import_class(target, "stage.module")


def _make(node: Mapping[str, Any], where: str, given: Mapping[str, Any]) -> Any:
    found = import_class(node["_target_"], f"{where}._target_")
    problem = f"{where}: {node['_target_']} cannot be made"
    with user_code(problem):
        try:
            return found(**{**_taken(found, given, where), **_arguments(node)})
        except ImportError as error:
            if line := pip_line(found) or (f"pip install {error.name}" if error.name else ""):
                raise UserError(f"{problem}: {' '.join(str(error).split())}", f"Install it: {line}") from error
            raise


def _problems_of_object(node: Any, where: str, group: str) -> list[str]:
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(target, str) or "." not in target:
        return [f"{where}: has no _target_, the dotted name of a class."]
    found = import_class(target, f"{where}._target_")
    base = base_of(group)
    if not issubclass(found, base):
        return [f"{where}._target_={target!r}: is no {base.__name__} of Lightning."]
    if (reason := why_refused(found, _arguments(node))) is not None:
        return [f"{where}{reason}"]
    if (line := missing_package(found)) is not None:
        return [f"{where}: {target} needs a package that is not installed: {line}"]
    signature = _signature(found, where)
    known = signature.parameters
    arguments = {**_taken(found, dict.fromkeys(OBJECTS[group]), where), **_arguments(node)}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        unknown = [key for key in arguments if key not in known]
        if unknown:
            return [f"{where}.{key}: {target} takes no such argument; {did_you_mean(key, known)}" for key in unknown]
    try:
        signature.bind(**arguments)
    except TypeError as error:
        return [f"{where}: {target} cannot be made: {error}."]
    return []


def _signature(found: type, where: str) -> inspect.Signature:
    """What a class is made with. Raises :class:`UserError` where it says so in a way of its own that Python refuses."""
    with user_code(f"{where}: {found.__module__}.{found.__qualname__} has no signature"):
        return inspect.signature(found)


def _taken(found: type, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Those of the given arguments that a class names; a name only beside an id: elsewhere it is that of a folder."""
    known = _signature(found, where).parameters
    return {key: value for key, value in given.items() if key in known and (key != "name" or "id" in known)}


def _arguments(node: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in node.items() if key != "_target_"}
