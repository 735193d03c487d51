"""The files of a published table: given ones, those of a mirror, or downloaded ones; no file is in both parts.

A given folder or glob may hold both parts. What the names of its files say then counts, as for conversations.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.data.cache.content_cache import file_sha256
from nanochat_pl.data.conversations.tables import TABLE_SUFFIXES
from nanochat_pl.data.files.read import reading
from nanochat_pl.data.files.split_names import split_in_name
from nanochat_pl.data.sources.hub import key_of_cache, typed_keys
from nanochat_pl.tasks.base import Split
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.published.dataset_files import HubSet, SetFile, files_of_set, files_on_disk, require_all

if TYPE_CHECKING:
    from nanochat_pl.tasks.published.base import TableSettings

_NUMBERED = re.compile(r"-\d+-of-(\d+)")


@dataclass(frozen=True)
class TableFile:
    """A file of rows, with a hash of its contents. ``given``: by its path, and not one of the data set's."""

    name: str
    path: Path
    sha256: str
    given: bool


def table_files(name: str, where: str, settings: TableSettings, split: Split, context: TaskContext) -> list[TableFile]:
    """The files of a split, none of which is in the other one too.

    Raises:
        UserError: a file is missing, or cannot be read; or it is in both parts.
    """
    other: Split = "test" if split == "train" else "train"
    given = _given_parts(where, settings)
    mine, others = given[split], given[other]
    if mine is None:
        fix = how_to_fetch(name, settings, context)
        found = _of_repo(where, settings, split, context, fix)
        _require_whole(where, settings, found, context, fix)
        files = [_with_hash(file, False, context, f"It is not what {settings.repo} has. {fix}") for file in found]
    else:
        files = [_with_hash(file, True, context) for file in mine]
    if given[split] is not None or others is not None:
        if others is None:
            # What of it is not here is refused when that part is opened.
            with contextlib.suppress(UserError):
                others = _of_repo(where, settings, other, context)
        _refuse_shared(where, split, files, others or [], context)
    return files


def how_to_fetch(name: str, settings: TableSettings, context: TaskContext) -> str:
    """The command that fetches a task's table."""
    default = type(settings)()
    keys = {"task": name}
    for key in ("repo", "revision", "config"):
        if getattr(settings, key) != getattr(default, key):
            keys[key] = str(getattr(settings, key))
    return f"Fetch it: nanochat-pl download {typed_keys(keys | key_of_cache(context.cache_dir))}"


def _given_parts(where: str, settings: TableSettings) -> dict[Split, list[SetFile] | None]:
    """The files of each part that ``path`` and ``test_path`` give; None for one that is the data set's."""
    train: list[SetFile] | None = None
    test: list[SetFile] | None = None
    if settings.path is not None:
        found = files_on_disk(f"{where}.path", settings.path, TABLE_SUFFIXES)
        train, test = _by_name(found, settings)
        test = test or None
    if settings.test_path is not None:
        found = files_on_disk(f"{where}.test_path", settings.test_path, TABLE_SUFFIXES)
        test = _by_name(found, settings)[1] or found
    return {"train": train, "test": test}


def _by_name(found: Sequence[SetFile], settings: TableSettings) -> tuple[list[SetFile], list[SetFile]]:
    """Files to train on and files to hold out, by what their names say; all are to train on where that leaves none."""
    marked: dict[str | None, list[SetFile]] = {}
    for file in found:
        marked.setdefault(_mark(file.name, settings), []).append(file)

    def first(*marks: str | None) -> list[SetFile]:
        return next((marked[mark] for mark in marks if mark is not None and mark in marked), [])

    held_out = first(settings.test_split, split_in_name(f"{settings.test_split}-"), "test", "val")
    named = first(settings.train_split, split_in_name(f"{settings.train_split}-"), "train")
    train = [file for file in found if file in named or file in marked.get(None, [])]
    train = train or [file for file in found if file not in held_out]
    return (train, held_out) if train else (list(found), [])


def _mark(name: str, settings: TableSettings) -> str | None:
    """Of which split a file is by its path: one of the settings', by its own name, else train, val or test."""
    *folders, file = name.split("/")
    for split in (settings.train_split, settings.test_split):
        if re.search(rf"(?:^|[._-]){re.escape(split)}(?=[._-])", file):
            return split
    own_folder = (split for split in (settings.train_split, settings.test_split) if split in folders)
    return split_in_name(name) or next(own_folder, None)


def _of_repo(
    where: str, settings: TableSettings, split: Split, context: TaskContext, fix: str | None = None
) -> list[SetFile]:
    """The files of a part of the data set: of the mirror, else of what the hub has; they need not be downloaded."""
    everything = files_of_set(where, HubSet(settings.repo, settings.revision), TABLE_SUFFIXES, context, fix)
    key, table = f"{split}_split", settings.train_split if split == "train" else settings.test_split
    of_config = [file for file in everything if file.name.startswith(f"{settings.config}/")]
    found = [file for file in of_config if fnmatch.fnmatchcase(file.name, f"{settings.config}/{table}-*.parquet")]
    if not found:
        # The key that is wrong: there is no such folder, or in it no such split.
        valid = [PurePosixPath(file.name).name.partition("-")[0] for file in of_config]
        if not of_config:
            key, table = "config", settings.config
            inside = [str(PurePosixPath(file.name).parent) for file in everything if "/" in file.name]
            valid = inside or [file.name for file in everything]
        raise UserError(f"{where}.{key}={table!r}: {settings.repo} has no such files; {did_you_mean(table, valid)}")
    return found


def _require_whole(
    where: str, settings: TableSettings, found: Sequence[SetFile], context: TaskContext, fix: str
) -> None:
    """Refuse a part of which files are missing."""
    require_all(where, found, HubSet(settings.repo, settings.revision), context, fix)
    if (part := _NUMBERED.search(found[0].name)) and int(part[1]) != len(found):
        raise UserError(
            f"{where}: {len(found):,} of the {int(part[1]):,} files {found[0].name[: part.start()]}… of "
            f"{settings.repo} are here.",
            "Copy the others, too.",
        )


def _with_hash(file: SetFile, given: bool, context: TaskContext, fix: str = "") -> TableFile:
    assert file.path is not None, "files that are not here have been refused"
    sha256 = _sha256(file, context)
    if file.sha256 not in (None, sha256):
        raise UserError(f"{file.path}: is damaged.", fix)
    return TableFile(file.name, file.path, sha256, given)


def _sha256(file: SetFile, context: TaskContext) -> str:
    if file.path is None:
        return ""
    with reading(file.path):
        return file_sha256(file.path, context.cache_dir, file.at_rest)


def _refuse_shared(
    where: str, split: Split, files: Sequence[TableFile], others: Sequence[SetFile], context: TaskContext
) -> None:
    contents = {file.sha256 or _sha256(file, context): file for file in others}
    for mine in files:
        if other := contents.get(mine.sha256):
            one, two = (str(mine.path), str(other.path or other.name))[:: 1 if split == "train" else -1]
            both = f"{one} is" if one == two else f"{one} and {two} have the same contents; one is"
            raise UserError(
                f"{where}: {both} trained on{' and' if one == two else ', the other'} held out.",
                f"Say which files are for what: {where}.path and {where}.test_path.",
            )
