"""Conversations out of files: parquet with a column of messages, JSON lines, JSON. Read once, then found by number.

A file is read row by row and checked; what is good is kept in a cache folder, named by the file's hash: ``rows.jsonl``
(one conversation a line), where each line begins, which row of the file it was, and its place among all conversations,
which is a hash of it. So memory holds one row at a time, any conversation of any format is found at once, and a
second run reads nothing.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.cache.content_cache import file_sha256, fingerprint_of, read_cache, write_cache
from nanochat_pl.data.conversations.formats import MESSAGES, hint_of, keys_to_read, parse_json
from nanochat_pl.data.conversations.validate import NOT_UTF8, Audit, judge, parse_line
from nanochat_pl.data.files.read import explain_parquet_errors, format_of, lines_of, reading, require_column
from nanochat_pl.data.sources.base import place_by_hash
from nanochat_pl.tokenizer.chat_format import Fault

CONVERSATION_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json")
_RULE = 4  # part of every fingerprint: what counts as a conversation and how it is kept
_HOPELESS_ROWS = 10_000  # a file of which so many rows from the first are all bad is not read on
_ROWS_AT_ONCE = 256

Numbered = Iterator[tuple[int, Any]]  # number of the row in its file, and the row or a Fault


@dataclass(frozen=True)
class ConversationFile:
    """The good rows of one file.

    Attributes:
        fingerprint: changes with the file's contents and with the rule by which they are read.
        audit: what was found in its rows.
    """

    name: str
    folder: Path
    fingerprint: str
    audit: Audit

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Conversation ``index`` of the good ones: plain data with ``messages``."""
        start, end = self._offsets[index : index + 2].tolist()
        return dict(json.loads(self._text[start:end].tobytes()))

    @cached_property
    def places(self) -> np.ndarray:
        """float64 (n,): for each conversation a number in [0, 1) that depends on it alone."""
        return np.fromfile(self.folder / "places.bin", dtype="<f8")

    @cached_property
    def contents(self) -> str:
        """A hash of the conversations, in whatever order and format; "" where there are none."""
        return hashlib.sha256(np.sort(self.places).tobytes()).hexdigest() if len(self) else ""

    def row_number(self, index: int) -> int:
        """Which row of the file a conversation was: a line's number from 1, a row's of a table from 0."""
        return int(np.fromfile(self.folder / "numbers.bin", dtype="<i8", count=1, offset=8 * index)[0])

    @cached_property
    def _offsets(self) -> np.ndarray:
        return np.fromfile(self.folder / "offsets.bin", dtype="<i8")

    @cached_property
    def _text(self) -> np.ndarray:
        return np.memmap(self.folder / "rows.jsonl", dtype=np.uint8, mode="r").view(np.ndarray)


def holds_conversations(path: Path, text_column: str) -> bool:
    """Whether a file has ``messages`` and no text: the columns of a table, or the first row of another, tell.

    Raises:
        UserError: it cannot be read.
    """
    if format_of(path) == ".parquet":
        with explain_parquet_errors(path), pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            return keys_to_read(MESSAGES, names) is not None and text_column not in names
    _, rows = _rows(path, MESSAGES)
    first = next(rows, None)
    return first is not None and not isinstance(judge(first[1], MESSAGES), Fault)


def read_conversations(name: str, path: Path, column: str, cache_dir: Path, at_rest: bool = False) -> ConversationFile:
    """Read and check a file, or find it read.

    Args:
        column: of the messages, in a table or an object.
        at_rest: see :func:`~nanochat_pl.data.cache.content_cache.file_sha256`.

    Raises:
        UserError: the file cannot be read, is no whole one, has no such column, or no conversation in its first
            thousands of rows.
    """
    with reading(path):
        sha256 = file_sha256(path, cache_dir, at_rest)
    key = {"rule": _RULE, "sha256": sha256, "format": format_of(path, CONVERSATION_SUFFIXES), "column": column}
    fingerprint = fingerprint_of(key)
    folder = cache_dir / "conversation_files" / fingerprint[:32]
    facts = read_cache(folder, key)
    if facts is None:
        facts = _write(folder, key, path, column)
        with reading(path):
            if file_sha256(path, cache_dir, at_rest) != sha256:
                (folder / "manifest.json").unlink()
                raise UserError(f"{path}: was changed while it was read.", "Run the same command again.")
    return ConversationFile(name, folder, fingerprint, Audit(**facts))


def _write(folder: Path, key: Any, path: Path, column: str) -> dict[str, Any]:
    audit, facts = Audit(), dict[str, Any]()
    offsets, numbers, places = array("q", [0]), array("q"), array("d")

    def write_rows(to: Path) -> None:
        kind, rows = _rows(path, column, audit)
        with to.open("wb") as file:
            for number, row in rows:
                audit.rows += 1
                judged = judge(row, column)
                if isinstance(judged, Fault):
                    audit.count_bad(judged, f"{kind} {number:,}")
                    if audit.num_bad == audit.rows == _HOPELESS_ROWS:
                        raise _no_conversation(path, audit)
                else:
                    audit.count_good(judged)
                    file.write(judged.line)
                    offsets.append(offsets[-1] + len(judged.line))
                    numbers.append(number)
                    places.append(place_by_hash(judged.line))
        facts.update(asdict(audit))

    def writer(values: array, dtype: str) -> Callable[[Path], None]:
        return lambda to: np.array(values, dtype=dtype).tofile(to)

    files = {"rows.jsonl": write_rows, "offsets.bin": writer(offsets, "<i8")}
    write_cache(
        folder, key, files | {"numbers.bin": writer(numbers, "<i8"), "places.bin": writer(places, "<f8")}, facts
    )
    return facts


def _no_conversation(path: Path, audit: Audit) -> UserError:
    lines = [f"{count:,}: {cause}" for cause, count in audit.bad.items()]
    examples = [line for lines in audit.examples.values() for line in lines]
    return UserError(
        [f"{path}: of its first {audit.rows:,} rows none is a conversation ({'; '.join(lines)}).", *examples]
    )


def _rows(path: Path, column: str, audit: Audit | None = None) -> tuple[str, Numbered]:
    """What a row is called in this kind of file, and the rows."""
    suffix = format_of(path, CONVERSATION_SUFFIXES)
    if suffix == ".parquet":
        return "row", _parquet_rows(path, column, audit or Audit())
    if suffix == ".json" and (rows := _json_list(path)) is not None:
        return "row", enumerate(rows)
    return "line", _jsonl_rows(path)


def _jsonl_rows(path: Path) -> Numbered:
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            yield number, parse_line(line)


def _json_list(path: Path) -> list[Any] | None:
    """The rows of a file that is one JSON list of them, or one row; any other is JSON lines under another name."""
    with reading(path):
        try:
            whole = parse_json(path.read_bytes().decode("utf-8-sig"))
        except UnicodeDecodeError:
            whole = NOT_UTF8
    is_one_conversation = isinstance(whole, list) and all(isinstance(row, dict) and "role" in row for row in whole)
    if isinstance(whole, dict) or is_one_conversation:
        return [whole]
    return whole if isinstance(whole, list) else None


def _parquet_rows(path: Path, column: str, audit: Audit) -> Numbered:
    number = 0
    with explain_parquet_errors(path):
        file = pq.ParquetFile(path)
    with file:
        schema = file.schema_arrow
        columns = keys_to_read(column, schema.names)
        if columns is None:
            fix = "Name the one that holds the messages with mixture.tasks.conversations.NAME.column=…."
            fix += hint_of(schema.names)
            require_column(path, schema, column, fix)
        for name in columns or ():
            require_column(path, schema, name)
        if file.metadata.num_rows:
            audit.unread |= {name: file.metadata.num_rows for name in schema.names if name not in (columns or ())}
        with explain_parquet_errors(path):
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                values = {name: _plain_rows(batch.column(name)) for name in batch.schema.names}
                for i in range(batch.num_rows):
                    row = {name: each[i] for name, each in values.items()}
                    fault = next((value for value in row.values() if isinstance(value, Fault)), None)
                    yield number, fault or row
                    number += 1


def _plain_rows(values: pa.Array) -> list[Any]:
    try:
        rows = values.to_pylist()
        return [_decoded(row) for row in rows] if "binary" in str(values.type) else rows
    except (ValueError, OverflowError, LookupError):  # one is no UTF-8, or beyond the dates or time zones of Python
        return [_plain_row(value) for value in values]


def _plain_row(value: pa.Scalar) -> Any:
    try:
        return _decoded(_as_py(value))
    except UnicodeDecodeError:
        return NOT_UTF8


def _as_py(value: pa.Scalar) -> Any:
    """A value as plain data; a time that Python cannot hold as its number."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError, LookupError):
        if isinstance(value, pa.StructScalar):
            return {name: _as_py(each) for name, each in value.items()}
        if isinstance(value, pa.MapScalar):
            return [tuple(map(_as_py, pair.values())) for pair in value.values]
        if isinstance(value, pa.ListScalar):
            return list(map(_as_py, value.values))
        return _as_py(value.value) if isinstance(value.value, pa.Scalar) else value.value


def _decoded(value: Any) -> Any:
    """Bytes, which some writers of tables mean for text, as text."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _decoded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_decoded, value))
    return value
