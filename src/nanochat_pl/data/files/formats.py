"""Documents out of one file: parquet, JSON lines (also compressed), text. Whatever is wrong is said with its place.

A document without any sign that prints is given as "": so it keeps its number, and whoever counts documents without a
token has counted these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.text_files import is_unicode
from nanochat_pl.data.files.read import (
    explain_parquet_errors,
    format_of,
    holds_text,
    json_line,
    lines_of,
    reading,
    require_column,
    texts_of,
)
from nanochat_pl.data.files.txt import txt_documents


def documents_of(path: Path, text_column: str, txt_document_chars: int) -> Iterator[str]:
    """The documents of a file, in its order; those that are null or blank in a table are "".

    Args:
        txt_document_chars: the most characters of a text file's document.

    Raises:
        UserError: with the file and the row group, line or byte at fault.
    """
    suffix = format_of(path)
    if suffix == ".parquet":
        return _parquet_documents(path, text_column)
    if suffix == ".txt":
        return txt_documents(path, txt_document_chars)
    return _jsonl_documents(path, text_column)


def check_file(path: Path, text_column: str) -> bool:
    """Find at once what a look at a file's footer or first line can tell.

    Returns:
        whether there is anything in it.

    Raises:
        UserError: it cannot be opened, is cut off, or has no text under ``text_column``.
    """
    if format_of(path) == ".parquet":
        with _open_parquet(path, text_column) as file:
            return bool(file.metadata.num_rows)
    if format_of(path) != ".txt":
        return next(_jsonl_documents(path, text_column), None) is not None
    with reading(path), path.open("rb") as text:
        return bool(text.read(1))


def _open_parquet(path: Path, text_column: str) -> pq.ParquetFile:
    with explain_parquet_errors(path):
        file = pq.ParquetFile(path)
    with contextlib.ExitStack() as on_error:
        on_error.callback(file.close)
        require_column(path, file.schema_arrow, text_column, "Name the one that holds the text: data.text_column=…")
        kind = file.schema_arrow.field(text_column).type
        if not holds_text(kind):
            raise UserError(f"{path}: the column {text_column!r} holds {kind} and not text; set data.text_column=…")
        on_error.pop_all()
    return file


def _parquet_documents(path: Path, text_column: str) -> Iterator[str]:
    with _open_parquet(path, text_column) as file:
        for group in range(file.num_row_groups):
            where = f"{path}, row group {group}"
            with explain_parquet_errors(path, f", row group {group}"):
                texts = file.read_row_group(group, columns=[text_column]).column(0)
            try:
                documents = texts_of(texts)
            except UnicodeDecodeError as error:
                row = _first_undecodable(texts)
                raise UserError(
                    f"{where}: the {text_column!r} of its row {row:,} is not UTF-8 ({error.reason}).",
                    fix="The file is whole, that text is not: leave the row out, or write it as UTF-8.",
                ) from error
            for text in documents:
                yield _blank_as_empty(text or "")


def _first_undecodable(texts: pa.ChunkedArray) -> int:
    """The number, from 0, of the first text that is not UTF-8."""
    for row in range(len(texts)):
        try:
            texts_of(texts.slice(row, 1))
        except UnicodeDecodeError:
            return row
    raise AssertionError("called where there is one")


def _blank_as_empty(text: str) -> str:
    return "" if text.isspace() else text


def _jsonl_documents(path: Path, text_column: str) -> Iterator[str]:
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            yield _blank_as_empty(_text_of_line(line, f"{path}:{number}", text_column))


def _text_of_line(line: bytes, where: str, text_column: str) -> str:
    record = json_line(line, where)
    if not isinstance(record, dict):
        raise UserError(f"{where}: is not a JSON object with the key {text_column!r}: {line[:60]!r}")
    if text_column not in record:
        raise UserError(
            f"{where}: has no key {text_column!r}; its keys: {', '.join(record)}",
            fix="Name the one that holds the text: data.text_column=…",
        )
    text = record[text_column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: {text_column!r} is {type(text).__name__} and not text.")
    if not is_unicode(text):
        raise UserError(f"{where}: {text_column!r} holds half of a surrogate pair, which is no character.")
    return text
