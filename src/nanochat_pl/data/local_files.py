"""``data=local``: parquet, JSON lines and text files of the user's own.

Which documents are held out is decided by a hash of each document's text: one file is enough, copies of a text stay on
one side, and files that come, go or are renamed change nothing for the others.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.cache_folder import fingerprint_of, known_sha256
from nanochat_pl.data.file_formats import check_file, documents_of
from nanochat_pl.data.file_reading import SUFFIXES, format_of, reading
from nanochat_pl.data.sources import Shard, SourceSettings, Split, place_by_hash

_NOTHING = hashlib.sha256().hexdigest()
_RULE = 2  # part of every fingerprint: how files become documents and documents become splits


class LocalFiles:
    """A :class:`~nanochat_pl.data.sources.Source` of the files under ``data.path``; one shard per file and split.

    Args:
        settings: which files.
        cache_dir: where their hashes are kept.
        key: of these settings, for messages.

    Raises:
        UserError: no file matches, a suffix is unknown, a file cannot be opened or lacks the text column; a file to
            validate on is one to train on, or has the same contents.
    """

    name = "local"

    def __init__(self, settings: SourceSettings, cache_dir: Path, key: str = "data") -> None:
        assert settings.path is not None, "checked by the settings"
        self._settings = settings
        self._memo_dir = cache_dir / "file_hashes"
        self._train_files = self._val_files = find_files(f"{key}.path", settings.path)
        if settings.validation_path is not None:
            self._val_files = find_files(f"{key}.validation_path", settings.validation_path)
        paths = dict.fromkeys([*self._train_files.values(), *self._val_files.values()])
        self._num_empty = sum(not check_file(path, settings.text_column) for path in paths)
        if settings.validation_path is not None:
            self._refuse_shared_files(key)
        self._held_out = None if settings.validation_path is not None else self._share_held_out()

    @property
    def fingerprint(self) -> str:
        return fingerprint_of([shard.fingerprint for split in ("train", "val") for shard in self.shards(split)])

    def describe(self) -> str:
        """One line for people: the files, what is held out, and the hash of their documents."""
        files = len({*self._train_files.values(), *self._val_files.values()})
        held_out = f"; {self._held_out:.2%} of the documents are held out" if self._held_out is not None else ""
        copies = copies_of_files((shard.contents, shard.name) for shard in self.shards("train"))
        empty = f", {self._num_empty:,} of them empty" if self._num_empty else ""
        line = (
            f"{self._settings.path}: {files:,} file{'s' if files > 1 else ''}{empty}, {self.fingerprint[:12]}{held_out}"
        )
        return "; ".join([line, *copies])

    def shards(self, split: Split) -> list[Shard]:
        files = self._train_files if split == "train" else self._val_files
        return [self._shard(name, path, split) for name, path in files.items()]

    def _shard(self, name: str, path: Path, split: Split) -> Shard:
        sha256, problem = self._sha256(path), "was changed while it was read."
        documents = FileDocuments(
            path,
            split,
            self._settings,
            self._held_out,
            sha256,
            self._memo(path),
            problem,
            "Run the same command again.",
        )
        return documents.as_shard(name, sha256)

    def _refuse_shared_files(self, key: str) -> None:
        """Two keys that give the same text: paths that lead to one file, and copies under other names."""
        train = {self._sha256(path): path for path in self._train_files.values()}
        for path in self._val_files.values():
            twin = train.get(sha256 := self._sha256(path))
            if twin is not None and sha256 != _NOTHING:
                same = f", with the same contents as {twin}" if twin.resolve() != path.resolve() else ""
                raise UserError(
                    f"{path}: is under {key}.path and under {key}.validation_path{same}.",
                    fix=f"Leave it to one of them, or leave {key}.validation_path out: then a share is held out.",
                )

    def _share_held_out(self) -> float:
        return share_held_out(list(self._train_files.values()), self._settings)

    def _sha256(self, path: Path) -> str:
        with reading(path):
            return known_sha256(path, self._memo(path))

    def _memo(self, path: Path) -> Path:
        return self._memo_dir / f"{fingerprint_of(str(path.resolve()))[:32]}.json"


@dataclass(frozen=True)
class FileDocuments:
    """Calling it gives the documents of a file that belong to a split. It can be sent to another process.

    Attributes:
        path, split, settings: which, and how they are read.
        held_out: the share of the documents that is for validation, see :func:`share_held_out`; None: all of them are
            of this split.
        sha256: of the file, checked before and after reading; None: it is not checked.
        memo: where the hash is remembered, see :func:`~nanochat_pl.data.cache_folder.known_sha256`.
        problem, fix: what is said where the file is another one.
        at_rest: whether nobody writes to the file.
    """

    path: Path
    split: Split
    settings: SourceSettings
    held_out: float | None
    sha256: str | None
    memo: Path
    problem: str
    fix: str
    at_rest: bool = False

    def __call__(self) -> Iterator[str]:
        settings = self.settings
        self._require_same()
        for text in documents_of(self.path, settings.text_column, settings.txt_document_chars):
            if self.held_out is None or (place_by_hash(text.encode("utf-8")) <= self.held_out) == (self.split == "val"):
                yield text
        self._require_same()

    def as_shard(self, name: str, contents: str) -> Shard:
        """A shard of these documents; ``contents`` stands for the file's in its fingerprint."""
        settings = self.settings
        how = [format_of(self.path), settings.text_column, settings.txt_document_chars, self.held_out, self.split]
        # Columns of one table hold different text.
        column = None if format_of(self.path) == ".txt" else settings.text_column
        whole = "" if self.sha256 == _NOTHING else fingerprint_of(self.sha256 or contents, column)
        return Shard(name, self.split, fingerprint_of(_RULE, contents, how), whole, self)

    def _require_same(self) -> None:
        with reading(self.path):
            if self.sha256 is not None and known_sha256(self.path, self.memo, self.at_rest) != self.sha256:
                raise UserError(f"{self.path}: {self.problem}", self.fix)


def copies_of_files(files: Iterable[tuple[str, str]]) -> list[str]:
    """A line where files have the same contents. ``files``: hash of the contents, "" for nothing, and name of each."""
    seen: dict[str, str] = {}
    copies = [
        (name, seen[contents]) for contents, name in files if contents and seen.setdefault(contents, name) != name
    ]
    more = f" (and {len(copies) - 1:,} more are copies)" if len(copies) > 1 else ""
    return [f"{copies[0][0]} is a copy of {copies[0][1]}: trained on twice{more}"] if copies else []


def share_held_out(paths: Sequence[Path], settings: SourceSettings) -> float:
    """The share asked for; where it would hold out nothing, of a handful of documents, enough for one of them."""
    lowest = 1.0
    for path in paths:
        for text in filter(None, documents_of(path, settings.text_column, settings.txt_document_chars)):
            lowest = min(lowest, place_by_hash(text.encode("utf-8")))
            if lowest <= settings.validation_fraction:
                return settings.validation_fraction
    return lowest


def find_files(key: str, given: str, suffixes: Sequence[str] = SUFFIXES) -> dict[str, Path]:
    """The files that a path, folder or glob means, by name, in sorted order.

    A folder stands for the files with one of the suffixes in it and below; hidden ones are left out.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        below = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
        visible = {name: file for name, file in below if not f"/{name}".count("/.")}
        files = {name: file for name, file in visible.items() if format_of(file, suffixes)}
        if not files:
            found = sorted({file.suffix or file.name for file in visible.values()})
            raise UserError(
                f"{key}={given!r}: no file in this folder ends with {' or '.join(suffixes)}; "
                + (f"there are {', '.join(found[:8])}." if found else "it is empty.")
            )
        return files
    # Path.glob takes no absolute patterns.
    matches = [given] if path.is_file() else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
    paths = [Path(match).expanduser() for match in matches if Path(match).expanduser().is_file()]
    if not paths:
        raise UserError(f"{key}={given!r}: there is no such file or folder (seen from {Path.cwd()}).")
    unknown = [str(file) for file in paths if not format_of(file, suffixes)]
    if unknown:
        raise UserError(f"{key}={given!r}: {unknown[0]} does not end with {' or '.join(suffixes)}.")
    folder = Path(os.path.commonpath([file.parent for file in paths]))
    return {file.relative_to(folder).as_posix(): file for file in paths}
