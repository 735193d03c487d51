"""Rows of tables: parquet files and JSON lines."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.files.read import explain_parquet_errors, format_of, json_line, lines_of, require_column

TABLE_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")

Row = dict[str, Any]


class Rows:
    """The rows of some files, one file after the other. What their columns hold is not looked at.

    Those of parquet files stay as they were read: as dicts, the hundred thousand of MMLU would take 450 MiB.
    """

    def __init__(self, paths: Sequence[Path], columns: Sequence[str]) -> None:
        """
        Args:
            columns: those that a row is to have.

        Raises:
            UserError: a file cannot be read or has no rows, a column is missing, a line is no JSON object; names file,
                column or line.
        """
        self._paths = paths
        self._tables = [_read(path, columns) for path in paths]
        self._ends = list(itertools.accumulate(map(len, self._tables)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Row:
        file, place = self.place(index)
        table = self._tables[file]
        if isinstance(table, list):
            return table[place]
        try:
            return {name: table.column(name)[place].as_py() for name in table.column_names}
        except UnicodeDecodeError as error:
            raise UserError(f"{self._paths[file]}, row {place:,}: is not UTF-8 ({error.reason}).") from error

    def lengths(self, column: str, field: str | None = None) -> np.ndarray:
        """int64 (n,): how many entries each row's list has, without reading what they are; 0 where there is no list.

        Args:
            field: where the column holds objects, their key with the list.
        """
        return np.concatenate([_lengths(table, column, field) for table in self._tables])

    def place(self, index: int) -> tuple[int, int]:
        """Which file, and which of its rows, both from 0."""
        file = bisect.bisect_right(self._ends, index)
        return file, index - (self._ends[file] - len(self._tables[file]))


def _lengths(table: pa.Table | list[Row], column: str, field: str | None) -> np.ndarray:
    if isinstance(table, list):
        values = [row[column] for row in table]
        if field is not None:
            values = [value.get(field) if isinstance(value, dict) else None for value in values]
        return np.array([len(value) if isinstance(value, list) else 0 for value in values], dtype=np.int64)
    lists = table.column(column)
    if field is not None:
        has_it = pa.types.is_struct(lists.type) and lists.type.get_field_index(field) >= 0
        lists = pc.struct_field(lists, field) if has_it else pa.nulls(len(table))
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
        return np.zeros(len(table), dtype=np.int64)
    return np.asarray(pc.fill_null(pc.list_value_length(lists), 0), dtype=np.int64)


def _read(path: Path, columns: Sequence[str]) -> pa.Table | list[Row]:
    is_parquet = format_of(path, TABLE_SUFFIXES) == ".parquet"
    table = _read_parquet(path, columns) if is_parquet else _read_lines(path, columns)
    if not len(table):
        raise UserError(f"{path}: has no rows.")
    return table


def _read_parquet(path: Path, columns: Sequence[str]) -> pa.Table:
    with explain_parquet_errors(path), pq.ParquetFile(path) as file:
        for column in columns:
            require_column(path, file.schema_arrow, column)
        return file.read(columns=list(columns))


def _read_lines(path: Path, columns: Sequence[str]) -> list[Row]:
    rows = []
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = json_line(line, where)
        if not isinstance(row, dict):
            raise UserError(f"{where}: is not a JSON object.")
        if missing := [column for column in columns if column not in row]:
            raise UserError(f"{where}: has no column {missing[0]!r}; its columns: {', '.join(row) or 'none'}.")
        rows.append({column: row[column] for column in columns})
    return rows
