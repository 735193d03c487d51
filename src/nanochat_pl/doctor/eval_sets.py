"""The evaluation sets that the doctor looks for in the training text: items as plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.cache.conversations import Conversations
from nanochat_pl.data.files.read import json_line, lines_of


class ConversationTexts(Sequence[str]):
    """The text of conversations, each made when it is asked for: questions and reference answers, a line each."""

    def __init__(self, conversations: Conversations, from_files: bool = True) -> None:
        """``from_files``: whether people wrote them; else they are made of templates."""
        self._conversations, self.from_files = conversations, from_files

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: Any) -> Any:
        contents = [message["content"] for message in self._conversations[index]["messages"]]
        return "\n".join(
            text
            for content in contents
            for text in ([content] if isinstance(content, str) else [part["text"] for part in content])
        )


def read_eval_bundle(folder: Path) -> dict[str, list[str]]:
    """The items of all JSON lines files of an evaluation bundle: of each line all texts, whatever their keys.

    Args:
        folder: with ``eval_data`` in it, or with the files themselves, at any depth.

    Raises:
        UserError: there are no such files, or a line is no JSON; names file and line.
    """
    root = folder / "eval_data" if (folder / "eval_data").is_dir() else folder
    paths = sorted(root.rglob("*.jsonl")) if root.is_dir() else []
    if not paths:
        raise UserError(
            f"eval_bundle={folder}: there is no *.jsonl in it.", "Give the folder of the bundle, which holds eval_data."
        )
    return {path.relative_to(root).with_suffix("").as_posix(): list(_items(path)) for path in paths}


def _items(path: Path) -> Iterator[str]:
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            yield "\n".join(_texts(json_line(line, f"{path}, line {number}")))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
