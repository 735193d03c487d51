"""`changes.jsonl`: what was otherwise each time that a stage went on. One line each, for people and for the bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import write_text

NAME = "changes.jsonl"


def note_changes(stage_folder: Path, changes: Sequence[str], code: Mapping[str, Any] | None = None) -> None:
    """Add to the record of a stage what is otherwise than before, unless its last line says so already.

    Args:
        stage_folder: of the stage.
        changes: one sentence each.
        code: of the program that goes on, where it is not that of before.
    """
    lines = read_changes(stage_folder)
    line = {"changes": [*changes], **({"code": code} if code else {})}
    if not lines or line != {key: value for key, value in lines[-1].items() if key != "time"}:
        lines.append({"time": datetime.now(UTC).isoformat(timespec="seconds"), **line})
        text = "".join(json.dumps(each, ensure_ascii=False, allow_nan=False) + "\n" for each in lines)
        write_text(stage_folder / NAME, text)


def read_changes(stage_folder: Path) -> list[dict[str, Any]]:
    """The record of all changes of a stage, oldest first."""
    path = stage_folder / NAME
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path}: is no valid JSON: {error}", fix="Delete it: it is a record, nothing more.") from error
