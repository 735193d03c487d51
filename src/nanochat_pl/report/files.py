"""Files of a run folder as plain data, each checked for its form; an error names the file and the line.

A last line without a line end is what a killed process leaves behind, and is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_object, whole_lines
from nanochat_pl.common.schema import is_finite_number


def number(values: Mapping[str, Any], key: str, path: Path, whole: bool = False) -> Any:
    """A finite number of a file, or None where it is not there."""
    value = values.get(key)
    if value is None:
        return None
    if not is_finite_number(value) or (whole and not isinstance(value, int)):
        raise UserError(f"{path}: {key}={value!r}: must be a {'whole ' if whole else ''}number.")
    return value


def finite_numbers(values: Any, path: Path | str) -> dict[str, float]:
    """The finite numbers of a group; what else is in it is left out."""
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: {values!r}: must be a group of named numbers.")
    return {key: value for key, value in values.items() if is_finite_number(value)}


def optional_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty where there is no such file."""
    if not path.exists():
        return {}
    return read_object(path, surrogates=True)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line's place, for messages, and its value."""
    for number, line in enumerate(lines(path), start=1):
        try:
            yield f"{path}: line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number}: is no valid JSON: {error}") from error


def lines(path: Path) -> list[str]:
    """The whole lines of a UTF-8 file; none where there is no such file."""
    if not path.exists():
        return []
    try:
        return [line.decode("utf-8") for line in whole_lines(path)]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no UTF-8 text: {error}") from error
