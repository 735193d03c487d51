"""Rows of tables: parquet files and JSON lines, read whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.conversation_rows import parse_line
from nanochat_pl.data.file_formats import format_of, lines_of, parquet_errors
from nanochat_pl.tokenizer.chat_format import Fault

TABLE_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")

Row = dict[str, Any]


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """All rows of a file (with one of TABLE_SUFFIXES), each with the columns asked for; their values are not looked at.

    Raises:
        UserError: it cannot be read, a column is missing, a line is no JSON object; names file, column or line.
    """
    rows = _parquet_rows(path, columns) if format_of(path, TABLE_SUFFIXES) == ".parquet" else _lines(path, columns)
    if not rows:
        raise UserError(f"{path}: has no rows.")
    return rows


def _parquet_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    with parquet_errors(path), pq.ParquetFile(path) as table:
        names = table.schema_arrow.names
        if missing := [column for column in columns if column not in names]:
            raise _no_column(str(path), missing[0], names)
        return list(table.read(columns=list(columns)).to_pylist())


def _lines(path: Path, columns: Sequence[str]) -> list[Row]:
    rows = []
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        where, row = f"{path}:{number}", parse_line(line)
        if isinstance(row, Fault):
            raise UserError(f"{where}: {row.problem}")
        if not isinstance(row, dict):
            raise UserError(f"{where}: is no JSON object.")
        if missing := [column for column in columns if column not in row]:
            raise _no_column(where, missing[0], list(row))
        rows.append({column: row[column] for column in columns})
    return rows


def _no_column(where: str, column: str, names: Sequence[str]) -> UserError:
    return UserError(f"{where}: has no column {column!r}; its columns: {', '.join(names) or 'none'}.")
