"""``data=local``: parquet, JSON lines and text files of the user's own.

Which documents are held out is decided by a hash of each document's text: one file is enough, copies of a text stay on
one side, and files that come, go or are renamed change nothing for the others. Files that are named for a split (train,
validation, test) are what their names say, as on the hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import shlex
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from nanochat_pl.common.console import counted_bytes
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.text_amounts import COMPRESSED_SHARE
from nanochat_pl.data.cache.content_cache import file_sha256, fingerprint_of
from nanochat_pl.data.files.folder import find_files
from nanochat_pl.data.files.formats import check_file, documents_of
from nanochat_pl.data.files.read import format_of, parquet_facts, reading
from nanochat_pl.data.files.split_names import configurations_remark, split_files, unused_remark
from nanochat_pl.data.sources.base import Shard, SourceSettings, Split, place_by_hash

_NOTHING = hashlib.sha256().hexdigest()
_FILES_AT_A_TIME = 8  # that are hashed: a fast disk gives more than one core can take
_RULE = 2  # part of every fingerprint: how files become documents and documents become splits
_TXT_RULE = 3  # the same of text files, which are cut at separators too


@dataclass(frozen=True)
class ChosenPaths:
    """The files of ``data.path``, by name.

    Attributes:
        train, validation: the same ones where a hash of each document tells.
        by_hash: whether it does.
        remarks: what is to be said of those that are not read, or not as text to train on.
    """

    train: dict[str, Path]
    validation: dict[str, Path]
    by_hash: bool
    remarks: tuple[str, ...] = ()


def choose_files(settings: SourceSettings, key: str) -> ChosenPaths:
    """Which files are trained on and which validated on: by ``validation_path``, else by their names, else by a hash.

    Raises:
        UserError: as :func:`~nanochat_pl.data.files.folder.find_files`.
    """
    found = find_files(f"{key}.path", str(settings.path))
    if settings.validation_path is not None:
        held_out = find_files(f"{key}.validation_path", settings.validation_path)
        remarks = [*found.remarks(), *held_out.remarks()]
        return ChosenPaths(found.files, held_out.files, by_hash=False, remarks=tuple(remarks))
    split = split_files(list(found.files), str)
    train, validation = (split.train, split.held_out) if split else (list(found.files),) * 2
    remarks = found.remarks() + configurations_remark(train, f"{key}.path={_in_folder(settings)}")
    if split:
        remarks += unused_remark(split.unused)
    files = found.files
    return ChosenPaths(
        {name: files[name] for name in train},
        {name: files[name] for name in validation},
        by_hash=split is None,
        remarks=tuple(remarks),
    )


def _in_folder(settings: SourceSettings) -> str:
    """How a folder of ``data.path`` is typed, with ``{}`` for its name."""
    path = Path(str(settings.path))
    return f"{shlex.quote(str(path))}/{{}}" if path.expanduser().is_dir() else "…/{}"


class LocalFiles:
    """A :class:`~nanochat_pl.data.sources.base.Source` of the files under ``data.path``; one shard per file and split.

    Raises:
        UserError: no file matches, a suffix is unknown, a file cannot be opened or lacks the text column; a file to
            validate on is one to train on, or has the same contents.
    """

    name = "local"

    def __init__(self, settings: SourceSettings, cache_dir: Path, key: str = "data") -> None:
        assert settings.path is not None, "checked by the settings"
        self._settings = settings
        self._cache_dir = cache_dir
        self.chosen = choose_files(settings, key)
        self._train_files, self._val_files = self.chosen.train, self.chosen.validation
        self._paths = list(dict.fromkeys([*self._train_files.values(), *self._val_files.values()]))
        with ThreadPoolExecutor(_FILES_AT_A_TIME) as threads:
            self._num_empty = sum(
                not there for there in threads.map(lambda path: check_file(path, settings.text_column), self._paths)
            )
        if not self.chosen.by_hash:
            self._refuse_shared_files(key)
        train = list(self._train_files.values())
        self._held_out = share_held_out(train, settings) if self.chosen.by_hash else None

    @property
    def fingerprint(self) -> str:
        return fingerprint_of([shard.fingerprint for split in ("train", "val") for shard in self.shards(split)])

    def describe(self) -> str:
        """One line for people: the files, what is held out, and the hash of their documents."""
        files = len(self._paths)
        held_out = f"; {self._held_out:.2%} of the documents are held out" if self._held_out is not None else ""
        if self._held_out is None and self._settings.validation_path is None:
            more = f" and {len(self._val_files) - 1:,} more" if len(self._val_files) > 1 else ""
            held_out = f"; validated on {next(iter(self._val_files))}{more}, by name"
        copies = copies_of_files((shard.contents, shard.name) for shard in self.shards("train"))
        empty = f", {self._num_empty:,} of them empty" if self._num_empty else ""
        line = (
            f"{self._settings.path}: {files:,} file{'s' if files > 1 else ''}{empty}, {self.fingerprint[:12]}{held_out}"
        )
        return "; ".join([line, *copies, *self.chosen.remarks])

    def remarks(self) -> list[str]:
        """What is to be known of these files before they are trained on: one line each."""
        return list(self.chosen.remarks)

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
            self._cache_dir,
            problem,
            "Run the same command again.",
        )
        return replace(documents.as_shard(name, sha256), text_bytes=self._known[path][1])

    def _refuse_shared_files(self, key: str) -> None:
        """Two keys that give the same text: paths that lead to one file, and copies under other names."""
        train = {self._sha256(path): path for path in self._train_files.values()}
        for path in self._val_files.values():
            twin = train.get(sha256 := self._sha256(path))
            if twin is not None and sha256 != _NOTHING:
                same = f", with the same contents as {twin}" if twin.resolve() != path.resolve() else ""
                if self._settings.validation_path is None:
                    raise UserError(
                        f"{path}: is validated on, by its name, and trained on{same}.",
                        fix=f"Leave one of the two out, or say what is validated on: {key}.validation_path=….",
                    )
                raise UserError(
                    f"{path}: is under {key}.path and under {key}.validation_path{same}.",
                    fix=f"Leave it to one of them, or leave {key}.validation_path out: then a share is held out.",
                )

    def _sha256(self, path: Path) -> str:
        return self._known[path][0]

    @cached_property
    def _known(self) -> dict[Path, tuple[str, float]]:
        """Hash and about the bytes of text of each file; several at a time are read, but for those that are as they
        were when their hash was remembered."""
        sizes: dict[Path, int] = {}
        for path in self._paths:
            with contextlib.suppress(OSError):  # it is no more: said where it is read
                sizes[path] = path.stat().st_size

        def look_at(path: Path) -> tuple[str, float]:
            with reading(path):
                sha256 = file_sha256(path, self._cache_dir)
            advance(sizes.get(path, 0))
            return sha256, _text_bytes(path, self._settings.text_column)

        with (
            counted_bytes(f"hashing {self._settings.path}", sum(sizes.values())) as advance,
            ThreadPoolExecutor(_FILES_AT_A_TIME) as threads,
        ):
            return dict(zip(self._paths, threads.map(look_at, self._paths), strict=True))


@dataclass(frozen=True)
class FileDocuments:
    """Calling it gives the documents of a file that belong to a split. It can be sent to another process.

    Attributes:
        path, split, settings: which, and how they are read.
        held_out: the share of the documents that is for validation, see :func:`share_held_out`; None: all of them are
            of this split.
        sha256: of the file, checked before and after reading; None: it is not checked.
        problem, fix: what is said where the file is another one.
    """

    path: Path
    split: Split
    settings: SourceSettings
    held_out: float | None
    sha256: str | None
    cache_dir: Path
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
        rule = _TXT_RULE if format_of(self.path) == ".txt" else _RULE
        return Shard(name, self.split, fingerprint_of(rule, contents, how), whole, self)

    def _require_same(self) -> None:
        with reading(self.path):
            if self.sha256 is not None and file_sha256(self.path, self.cache_dir, self.at_rest) != self.sha256:
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


def text_bytes(path: Path, text_column: str) -> float:
    """About how many bytes of text a file has: of a table what its column has, of compressed lines by the usual share.

    Raises:
        UserError: it cannot be read, or lacks the column.
    """
    check_file(path, text_column)
    return _text_bytes(path, text_column)


def _text_bytes(path: Path, text_column: str) -> float:
    """As :func:`text_bytes`, of a file that has been checked."""
    if format_of(path) == ".parquet":
        return parquet_facts(path)[2][text_column]
    with reading(path):
        return path.stat().st_size / (COMPRESSED_SHARE if path.suffix in (".gz", ".zst") else 1)
