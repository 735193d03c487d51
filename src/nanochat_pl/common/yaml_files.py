"""The one reader of YAML files that people write: experiments, the list of an evaluation bundle.

Values mean what they mean on the command line and in Hydra's files: ``1e-3`` is a number, ``10:30`` and ``2026-01-02``
are text. A key that stands twice is an error, also where one of the two is written with dots. Size, depth and what
aliases expand to are bounded, so no file takes long or fills the memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.text_files import read_text

MAX_BYTES = 2**18
MAX_DEPTH = 50
MAX_NODES = 100_000  # with every alias as often as it is used
_MERGE = "tag:yaml.org,2002:merge"
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


class _Loader(yaml.SafeLoader):
    """Plain data with the numbers of Hydra's grammar."""


_Loader.yaml_implicit_resolvers = {
    sign: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("float", "int", "timestamp")]
    for sign, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|[-+]?0b[01_]+|[-+]?0x[0-9a-fA-F_]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)|[-+]?[0-9][0-9_]*\.[0-9_]*"
        r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> Any:
    """The contents of a YAML file, as plain data; None for an empty one.

    Raises:
        UserError: it cannot be read, is no YAML, has a key twice, a tag, or more in it than such a file may have;
            names the file, and the line where there is one.
    """
    text = read_text(path, MAX_BYTES)
    try:
        _require_bounded(path, text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _require_plain(path, node, loader, "")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _error(path, mark, f"is no YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error


def _error(path: Path, mark: yaml.Mark | None, problem: str) -> UserError:
    where = f" in line {mark.line + 1}" if mark is not None else ""
    return UserError(f"{path}: {problem}{where}.")


def _require_bounded(path: Path, text: str) -> None:
    """Count what the file will expand to from its events, before anything is built."""
    sizes: dict[str, int] = {}  # of what an anchor names; 0 while it is read
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and nodes before it
    count = 0
    for event in yaml.parse(text, Loader=_Loader):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if sizes.get(str(anchor)) == 0:
                raise _error(path, event.start_mark, f"*{anchor} is part of what it names, which has no end")
            count += sizes.get(str(anchor), 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((anchor, count))
            count += 1
            if anchor is not None:
                sizes[anchor] = 0
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if anchor is not None:
                sizes[anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            name, before = open_nodes.pop()
            if name is not None:
                sizes[name] = count - before
        if len(open_nodes) > MAX_DEPTH:
            raise _error(path, event.start_mark, f"is nested deeper than {MAX_DEPTH} levels")
        if count > MAX_NODES:
            problem = f"holds more than {MAX_NODES:,} values, each alias as often as it is used"
            raise _error(path, event.start_mark, problem)


def _require_plain(path: Path, node: yaml.Node, loader: _Loader, where: str) -> None:
    """Refuse tags, numbers that are none, and keys that stand twice. What nodes expand to is bounded.

    Args:
        path: of the file.
        node: what is looked at, with all below it.
        loader: of the file.
        where: the keys that lead to it, for messages.
    """
    if node.tag == _MERGE:  # as a key it is passed over below
        raise _error(path, node.start_mark, "'<<' is no value, but the key that merges a group; put quotes around it")
    if node.tag not in _PLAIN:
        raise _error(path, node.start_mark, f"is no YAML of plain data: {node.tag.replace('tag:yaml.org,2002:', '!!')}")
    if isinstance(node, yaml.ScalarNode):
        try:
            loader.construct_object(node)
        except ValueError as error:
            raise _error(path, node.start_mark, f"{node.value[:60]!r} is no number that can be read") from error
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _require_plain(path, item, loader, f"{where}[{number}]")
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        prefix = f"{where}." if where else ""
        for key, name, mark in _names(node, ""):
            if name in seen and key.tag != _MERGE:
                raise _error(path, mark, f"{prefix}{name} stands in line {seen[name] + 1} and again")
            seen[name] = mark.line
        for key, value in node.value:
            if key.tag != _MERGE:
                _require_plain(path, key, loader, where)
            _require_plain(path, value, loader, f"{prefix}{getattr(key, 'value', '')}")


def _names(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[yaml.Node, str, yaml.Mark]]:
    """The keys of a mapping: its own, and those below it as they are written with dots."""
    own = [(key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    dotted = any("." in key.value for key, _ in own)
    texts = [key.value for key, _ in own]
    for key, value in own:
        # Of groups that stand twice the first line says it; those below are compared where dots name the same.
        yield key, f"{prefix}{key.value}", key.start_mark
        if (dotted or prefix) and isinstance(value, yaml.MappingNode) and texts.count(key.value) == 1:
            yield from _names(value, f"{prefix}{key.value}.")
