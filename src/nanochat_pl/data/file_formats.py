"""Documents out of one file: parquet, JSON lines (also compressed), text. Whatever is wrong is said with its place.

A document without any sign that prints is given as "": so it keeps its number, and whoever counts documents without a
token has counted these.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_pl.common.errors import UserError

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
_BLOCK = 2**16


def format_of(path: Path, suffixes: Sequence[str] = SUFFIXES) -> str | None:
    """Which of the suffixes a file's name ends with, if any."""
    return next((suffix for suffix in suffixes if path.name.lower().endswith(suffix)), None)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the operating system says about reading a path into a :class:`UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def documents_of(path: Path, text_column: str, txt_document_chars: int) -> Iterator[str]:
    """The documents of a file, in its order; those that are null or blank in a table are "".

    Args:
        path: a file with one of SUFFIXES.
        text_column: the column of a parquet file, the key of a JSON line, with the text.
        txt_document_chars: the most characters of a text file's document.

    Raises:
        UserError: with the file and the row group, line or byte at fault.
    """
    suffix = format_of(path)
    if suffix == ".parquet":
        return _parquet_documents(path, text_column)
    if suffix == ".txt":
        return _txt_documents(path, txt_document_chars)
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
    with parquet_errors(path):
        file = pq.ParquetFile(path)
    schema = file.schema_arrow
    if text_column not in schema.names:
        file.close()
        raise UserError(
            f"{path}: has no column {text_column!r}; its columns: {', '.join(schema.names)}",
            fix="Name the one that holds the text: data.text_column=…",
        )
    kind = schema.field(text_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    # A table without rows, or of nulls alone, often has no other type.
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        file.close()
        raise UserError(f"{path}: the column {text_column!r} holds {kind} and not text; set data.text_column=…")
    return file


@contextlib.contextmanager
def parquet_errors(path: Path, part: str = "") -> Iterator[None]:
    """Turn what is wrong with a parquet file into a :class:`UserError`."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path}{part}: is no whole parquet file: {reason}", fix="If it was downloaded, download it again."
        ) from error


def _parquet_documents(path: Path, text_column: str) -> Iterator[str]:
    with _open_parquet(path, text_column) as file:
        for group in range(file.num_row_groups):
            where = f"{path}, row group {group}"
            with parquet_errors(path, f", row group {group}"):
                texts = file.read_row_group(group, columns=[text_column]).column(0)
            try:
                documents = texts.to_pylist()
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
    for row, text in enumerate(texts):
        try:
            text.as_py()
        except UnicodeDecodeError:
            return row
    raise AssertionError("called where there is one")


def _blank_as_empty(text: str) -> str:
    return "" if text.isspace() else text


def parquet_facts(path: Path) -> tuple[int, int, dict[str, int]]:
    """Row groups, rows, and of each column the bytes before compression, as the footer of a parquet file tells them.

    Raises:
        UserError: it is no parquet file, or not a whole one.
    """
    with parquet_errors(path), pq.ParquetFile(path) as file:
        sizes = dict.fromkeys(file.schema_arrow.names, 0)
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        for group in groups:
            for number in range(group.num_columns):
                column = group.column(number)
                name = column.path_in_schema  # of a nested column that of a leaf, NAME.list.element
                name = name if name in sizes else name.split(".")[0]
                sizes[name] = sizes.get(name, 0) + column.total_uncompressed_size
        return len(groups), file.metadata.num_rows, sizes


def _jsonl_documents(path: Path, text_column: str) -> Iterator[str]:
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            yield _blank_as_empty(_text_of_line(line, f"{path}:{number}", text_column))


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file, which may be compressed, without a byte order mark."""
    try:
        with reading(path), _open_bytes(path) as file:
            first = file.readline()
            yield first.removeprefix(codecs.BOM_UTF8)
            yield from file
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: is no whole gzip file: {error}") from error


def _open_bytes(path: Path) -> IO[bytes]:
    name = path.name.lower()
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if name.endswith(".zst"):
        return io.BufferedReader(cast(io.RawIOBase, pa.input_stream(str(path), compression="zstd")))
    return path.open("rb")


def _text_of_line(line: bytes, where: str, text_column: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: is no JSON object with the key {text_column!r}: {line[:60]!r}")
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
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {text_column!r} holds half of a surrogate pair, which is no character.") from error
    return text


def _txt_documents(path: Path, most_chars: int) -> Iterator[str]:
    """A text file cut at blank lines into documents of at most so many characters.

    A short file is one document. Where a stretch that long has no blank line, the cut is at a line's end, else at a
    blank, else anywhere. Line ends become ``\\n``; a byte order mark and the blank lines around a document go.
    """
    text = ""
    with reading(path), path.open(encoding="utf-8-sig") as file:
        while True:
            try:
                block = file.read(_BLOCK)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: is not UTF-8: byte {_first_bad_byte(path):,} ({error.reason})",
                    fix=f"Convert it, for instance: iconv -f latin1 -t utf-8 {path.name} > utf8.txt",
                ) from error
            text += block
            while len(text) > most_chars or (text and not block):
                end = _cut(text, most_chars)
                document = text[:end].strip("\n")
                if document.strip():
                    yield document
                text = text[end:]
            if not block:
                return


def _cut(text: str, most_chars: int) -> int:
    """Where the first document of a text ends."""
    if len(text) <= most_chars:
        return len(text)
    for separator in ("\n\n", "\n", " "):
        at = text.rfind(separator, 0, most_chars)
        if at > 0:
            return at + len(separator)
    return most_chars


def _first_bad_byte(path: Path) -> int:
    """Position, from 0, of the first byte at which a file is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    with path.open("rb") as file:
        while True:
            block = file.read(_BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return position - pending + error.start
            if not block:
                return position
            position += len(block)
