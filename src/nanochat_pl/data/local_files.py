"""``data=local``: parquet, JSON lines and text files of the user's own.

Which documents are held out is decided by a hash of each document's text: one file is enough, copies of a text stay on
one side, and files that come, go or are renamed change nothing for the others.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.cache_folder import fingerprint_of, known_sha256
from nanochat_pl.data.file_formats import SUFFIXES, check_file, documents_of, format_of, reading
from nanochat_pl.data.sources import DataSettings, Shard, Split

_RULE = 1  # part of every fingerprint: how files become documents and documents become splits


class LocalFiles:
    """A :class:`~nanochat_pl.data.sources.Source` of the files under ``data.path``; one shard per file and split.

    Raises:
        UserError: no file matches, a suffix is unknown, a file cannot be opened or lacks the text column.
    """

    name = "local"

    def __init__(self, settings: DataSettings, cache_dir: Path) -> None:
        assert settings.path is not None, "checked by the settings"
        self._settings = settings
        self._memo_dir = cache_dir / "file_hashes"
        self._train_files = self._val_files = _find_files("data.path", settings.path)
        if settings.validation_path is not None:
            self._val_files = _find_files("data.validation_path", settings.validation_path)
            _refuse_shared_files(self._train_files, self._val_files)
        for path in dict.fromkeys([*self._train_files.values(), *self._val_files.values()]):
            check_file(path, settings.text_column)
        self._held_out = None if settings.validation_path is not None else self._share_held_out()

    @property
    def fingerprint(self) -> str:
        return fingerprint_of([shard.fingerprint for split in ("train", "val") for shard in self.shards(split)])

    def describe(self) -> str:
        """One line for people: the files and the hash of their documents."""
        files = len({*self._train_files.values(), *self._val_files.values()})
        return f"{self._settings.path}: {files:,} file{'s' if files > 1 else ''}, {self.fingerprint[:12]}"

    def shards(self, split: Split) -> list[Shard]:
        files = self._train_files if split == "train" else self._val_files
        return [self._shard(name, path, split) for name, path in files.items()]

    def _shard(self, name: str, path: Path, split: Split) -> Shard:
        settings, contents = self._settings, self._sha256(path)
        how = [format_of(path), settings.text_column, settings.txt_document_chars, self._held_out, split]
        fingerprint = fingerprint_of(_RULE, contents, how)
        return Shard(name, split, fingerprint, partial(self._documents_of_split, path, split, contents))

    def _documents_of_split(self, path: Path, split: Split, contents: str) -> Iterator[str]:
        for text in self._documents(path):
            if self._held_out is None or (_place_by_hash(text) <= self._held_out) == (split == "val"):
                yield text
        if self._sha256(path) != contents:
            raise UserError(f"{path}: was changed while it was read.", fix="Run the same command again.")

    def _documents(self, path: Path) -> Iterator[str]:
        return documents_of(path, self._settings.text_column, self._settings.txt_document_chars)

    def _share_held_out(self) -> float:
        """The share asked for; where it would hold out nothing, of a handful of documents, enough for one of them."""
        lowest = 1.0
        for path in self._train_files.values():
            for text in filter(None, self._documents(path)):
                lowest = min(lowest, _place_by_hash(text))
                if lowest <= self._settings.validation_fraction:
                    return self._settings.validation_fraction
        return lowest

    def _sha256(self, path: Path) -> str:
        with reading(path):
            return known_sha256(path, self._memo_dir / f"{fingerprint_of(str(path.resolve()))[:32]}.json")


def _place_by_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, evenly spread over texts."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:6], "big") / 2**48


def _find_files(key: str, given: str) -> dict[str, Path]:
    """The files that a path, folder or glob means, by name, in sorted order.

    A folder stands for the files with one of SUFFIXES in it and below; hidden ones are left out.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        below = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
        visible = {name: file for name, file in below if not f"/{name}".count("/.")}
        files = {name: file for name, file in visible.items() if format_of(file)}
        if not files:
            found = sorted({file.suffix or file.name for file in visible.values()})
            raise UserError(
                f"{key}={given!r}: no file in this folder ends with {' or '.join(SUFFIXES)}; "
                + (f"there are {', '.join(found[:8])}." if found else "it is empty.")
            )
        return files
    # Path.glob takes no absolute patterns.
    matches = [given] if path.is_file() else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
    paths = [Path(match).expanduser() for match in matches if Path(match).expanduser().is_file()]
    if not paths:
        raise UserError(f"{key}={given!r}: there is no such file or folder (seen from {Path.cwd()}).")
    unknown = [str(file) for file in paths if not format_of(file)]
    if unknown:
        raise UserError(f"{key}={given!r}: {unknown[0]} does not end with {' or '.join(SUFFIXES)}.")
    folder = Path(os.path.commonpath([file.parent for file in paths]))
    return {file.relative_to(folder).as_posix(): file for file in paths}


def _refuse_shared_files(train: dict[str, Path], val: dict[str, Path]) -> None:
    shared = {path.resolve() for path in train.values()} & {path.resolve() for path in val.values()}
    if shared:
        raise UserError(f"{min(shared)}: is under data.path and under data.validation_path.")
