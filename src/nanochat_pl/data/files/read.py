"""What a file of a known format holds: lines, tables, JSON. Whatever is wrong is said with its place."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_pl.common.errors import UserError, first_line
from nanochat_pl.common.text_files import not_utf8, require_regular, wide_encoding

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
_BLOCK = 2**16


def format_of(path: Path, suffixes: Sequence[str] = SUFFIXES) -> str | None:
    """Which of the suffixes a file's name ends with, if any."""
    return next((suffix for suffix in suffixes if path.name.lower().endswith(suffix)), None)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the operating system says about reading a path into a :class:`UserError`; no FIFO is waited for."""
    require_regular(path)
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def explain_parquet_errors(path: Path, part: str = "") -> Iterator[None]:
    """Turn what is wrong with a parquet file into a :class:`UserError`; no FIFO is waited for."""
    require_regular(path)
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}{part}: is no whole parquet file: {first_line(error)}",
            fix="If it was downloaded, download it again.",
        ) from error


def parquet_facts(path: Path) -> tuple[int, int, dict[str, int]]:
    """Row groups, rows, and of each column the bytes before compression, as the footer of a parquet file tells them.

    Raises:
        UserError: it is no parquet file, or not a whole one.
    """
    with explain_parquet_errors(path), pq.ParquetFile(path) as file:
        sizes = dict.fromkeys(file.schema_arrow.names, 0)
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        for group in groups:
            for number in range(group.num_columns):
                column = group.column(number)
                name = column.path_in_schema  # of a nested column that of a leaf, NAME.list.element
                name = name if name in sizes else name.split(".")[0]
                sizes[name] = sizes.get(name, 0) + column.total_uncompressed_size
        return len(groups), file.metadata.num_rows, sizes


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file, which may be compressed, without a byte order mark.

    Raises:
        UserError: it cannot be read, is no whole one, or is UTF-16 or UTF-32.
    """
    try:
        with reading(path), _open_bytes(path) as file:
            first = file.readline()
            if wide_encoding(first[:_BLOCK]) is not None:
                raise not_utf8(path, 0, "invalid start byte")
            yield first.removeprefix(codecs.BOM_UTF8)
            yield from file
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: is no whole gzip file: {error}") from error


def strict_json(text: str) -> Any:
    """JSON text as plain data.

    Raises:
        ValueError: it is no JSON, or has a key twice in an object: whichever is taken, the other would be lost.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def json_fault(error: ValueError | RecursionError) -> str:
    """What is wrong with a text that :func:`strict_json` did not take: a clause without its subject."""
    if not isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON ({error})"
    what = error.msg.removesuffix(" at").removesuffix(" starting")
    line = f"line {error.lineno}, " if error.lineno > 1 else ""
    return f"is not valid JSON ({what[:1].lower()}{what[1:]}, {line}column {error.colno})"


def json_line(line: bytes, where: str) -> Any:
    """A line of JSON as plain data, see :func:`strict_json`. Raises UserError where it is none; names ``where``."""
    try:
        return strict_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        why = f"{error.reason} at byte {error.start:,} of the line"
        raise UserError(f"{where}: is not valid JSON: it is not utf-8 ({why}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {json_fault(error)}.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
    return found


def require_column(path: Path, schema: pa.Schema, column: str, fix: str = "") -> None:
    """Refuse a table that has no such column, or has it twice.

    Raises:
        UserError: with the columns that there are, and ``fix``.
    """
    if (times := schema.names.count(column)) == 1:
        return
    if times:
        often = "twice" if times == 2 else f"{times} times"
        raise UserError(
            f"{path}: has the column {column!r} {often}: which one is meant, nobody can tell.",
            "Write the table with one name for each column.",
        )
    raise UserError(f"{path}: has no column {column!r}; its columns: {', '.join(schema.names) or 'none'}", fix)


def holds_text(kind: pa.DataType) -> bool:
    """Whether values of a type are text, or bytes that may be UTF-8; a column of nulls often has no other type."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        else:
            break
    kinds = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in kinds)


def texts_of(values: pa.Array | pa.ChunkedArray) -> list[str | None]:
    """The values of a column that :func:`holds_text`. Raises UnicodeDecodeError for one that is not UTF-8."""
    return [value.decode("utf-8") if isinstance(value, bytes) else value for value in values.to_pylist()]


def _open_bytes(path: Path) -> IO[bytes]:
    name = path.name.lower()
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if name.endswith(".zst"):
        return io.BufferedReader(cast(io.RawIOBase, pa.input_stream(str(path), compression="zstd")))
    return path.open("rb")
