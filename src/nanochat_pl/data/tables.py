"""Tables of data sets: the files that hold one split of one config, each with its hash, and their rows.

On a hub such a file is called ``CONFIG/SPLIT-00000-of-00001.parquet``. A mirror is a folder of the same layout:
``datasets/OWNER/NAME/CONFIG/SPLIT-00000-of-00001.parquet``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.cache_folder import fingerprint_of, known_sha256
from nanochat_pl.data.conversation_rows import parse_line
from nanochat_pl.data.file_formats import format_of, lines_of, parquet_errors, reading
from nanochat_pl.data.hub import hash_memo, known_manifest
from nanochat_pl.data.local_files import find_files
from nanochat_pl.tokenizer.chat_format import Fault

TABLE_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
_PART_OF = re.compile(r"-\d+-of-(\d+)")

Row = dict[str, Any]


@dataclass(frozen=True)
class TableFile:
    """A file of rows.

    Attributes:
        name: for people.
        path: where it lies.
        sha256: of its contents.
    """

    name: str
    path: Path
    sha256: str


def files_given(key: str, given: str, cache_dir: Path) -> list[TableFile]:
    """The tables that a path, folder or glob means, in sorted order.

    Args:
        key: of the setting, for messages.
        given: its value.
        cache_dir: ``paths.cache``; the files' hashes are remembered there.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    return [_with_hash(name, path, cache_dir) for name, path in find_files(key, given, TABLE_SUFFIXES).items()]


def files_of_mirror(mirror: Path, repo: str, config: str, split: str, cache_dir: Path) -> list[TableFile]:
    """The files of a split in a local mirror of a hub; empty where it has none.

    Raises:
        UserError: it has some of them and not all, or one cannot be read.
    """
    folder = mirror / "datasets" / repo / config
    paths = sorted(folder.glob(f"{split}-*.parquet"))
    if paths and (part := _PART_OF.search(paths[0].name)) and int(part[1]) != len(paths):
        raise UserError(
            f"{folder}: {len(paths):,} of the {int(part[1]):,} files of the split {split} are here.",
            "Copy the others, or remove these.",
        )
    return [_with_hash(f"{repo}/{config}/{path.name}", path, cache_dir) for path in paths]


def files_of_hub(
    where: str, repo: str, revision: str | None, config: str, split: str, cache_dir: Path, fix: str
) -> list[TableFile]:
    """The files of a split that have been downloaded.

    Args:
        where: begins a message.
        repo: ``OWNER/NAME``.
        revision: a branch, a tag or a commit; None: main.
        config, split: which table.
        cache_dir: ``paths.cache``.
        fix: what is said to do where a file is not here.

    Raises:
        UserError: not all of them are here, the data set has none, or one is not what the hub has.
    """
    manifest = known_manifest(repo, revision or "main", cache_dir)
    if manifest is None:
        raise UserError(f"{where}: nothing of {repo} ({revision or 'main'}) is here.", fix)
    files = []
    for file in manifest.matching(f"{config}/{split}-*.parquet", f"{where}: table"):
        path = manifest.at_hand(file)
        if path is None:
            raise UserError(f"{where}: {file.path} of {repo} is not here.", fix)
        with reading(path):
            sha256 = known_sha256(path, hash_memo(path, cache_dir), at_rest=True)
        if file.sha256 not in (None, sha256):
            raise UserError(f"{path}: is damaged: it is not what {repo} has.", fix)
        files.append(TableFile(f"{repo}/{file.path}", path, sha256))
    return files


def read_rows(file: TableFile, columns: Sequence[str]) -> list[Row]:
    """All rows of a file, each with the columns asked for; what is in them is not looked at.

    Raises:
        UserError: it cannot be read, a column is missing, a line is no JSON object; names file, column or line.
    """
    rows = _parquet_rows(file, columns) if format_of(file.path, TABLE_SUFFIXES) == ".parquet" else _lines(file, columns)
    if not rows:
        raise UserError(f"{file.path}: has no rows.")
    return rows


def _parquet_rows(file: TableFile, columns: Sequence[str]) -> list[Row]:
    with parquet_errors(file.path), pq.ParquetFile(file.path) as table:
        names = table.schema_arrow.names
        if missing := [column for column in columns if column not in names]:
            raise _no_column(str(file.path), missing[0], names)
        return list(table.read(columns=list(columns)).to_pylist())


def _lines(file: TableFile, columns: Sequence[str]) -> list[Row]:
    rows = []
    for number, line in enumerate(lines_of(file.path), 1):
        if not line.strip():
            continue
        where, row = f"{file.path}:{number}", parse_line(line)
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


def _with_hash(name: str, path: Path, cache_dir: Path) -> TableFile:
    path = path.resolve()
    with reading(path):
        return TableFile(
            name, path, known_sha256(path, cache_dir / "file_hashes" / f"{fingerprint_of(str(path))[:32]}.json")
        )
