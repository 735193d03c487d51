"""The files of a data set of a hub that a task reads whole: in a local mirror, or downloaded before."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.data.files.folder import FoundFiles, find_files
from nanochat_pl.data.hub.manifest import known_manifest
from nanochat_pl.data.sources.hub import files_of_format, key_of_cache, typed_keys
from nanochat_pl.tasks.context import TaskContext


@dataclass(frozen=True)
class SetFile:
    """A file to read. Without a path it has not been downloaded.

    Attributes:
        at_rest: whether nobody writes to it.
        sha256: what the hub says that it is; None for a file that did not come from there.
    """

    name: str
    path: Path | None
    at_rest: bool = False
    sha256: str | None = None


@dataclass(frozen=True)
class HubSet:
    """Which files of which data set: ``OWNER/NAME``, a branch, tag or commit (None: main), a glob (None: all).

    ``prefix`` stands before the names of these keys in the settings, for messages.
    """

    repo: str
    revision: str | None = None
    files: str | None = None
    prefix: str = ""


def files_on_disk(key: str, given: str, suffixes: Sequence[str]) -> list[SetFile]:
    """The files that a path, folder or glob means, in sorted order; see :func:`find_files`."""
    return set_files(find_files(key, given, suffixes))


def set_files(found: FoundFiles) -> list[SetFile]:
    """The files that were found."""
    return [SetFile(name, path.resolve()) for name, path in found.files.items()]


def files_of_set(
    where: str, wanted: HubSet, suffixes: Sequence[str], context: TaskContext, fix: str | None = None
) -> list[SetFile]:
    """The files of a data set, in sorted order: those of ``paths.hub`` where it is there, else of what was downloaded.

    Args:
        where: the key of the task, for messages.
        wanted: which.
        suffixes: what their names may end with; others are left out.
        context: the folders.
        fix: the command that fetches it, where :func:`how_to_fetch` does not tell.

    Raises:
        UserError: nothing of it is here (the fix is the command that fetches it), or it has no such file.
    """
    folder = context.hub / "datasets" / wanted.repo if context.hub else None
    if folder is not None and wanted.revision is None and folder.is_dir():
        return _in_mirror(where, folder, wanted, suffixes)
    manifest = known_manifest(wanted.repo, wanted.revision or "main", context.cache_dir)
    if manifest is None:
        problem = (
            f"{where}: nothing of {wanted.repo} ({wanted.revision or 'main'}) is here{_not_in_mirror(folder, context)}."
        )
        raise UserError(problem, fix or how_to_fetch(wanted, context))
    key = f"{where}.{wanted.prefix}"
    listed = files_of_format(manifest, wanted.files, suffixes, f"{key}files")
    found = [SetFile(file.path, manifest.at_hand(file), at_rest=True, sha256=file.sha256) for file in listed]
    if not found:
        raise UserError(f"{key}repo={wanted.repo!r}: no file of it ends with {' or '.join(suffixes)}.")
    return found


def require_all(
    where: str, files: Sequence[SetFile], wanted: HubSet, context: TaskContext, fix: str | None = None
) -> None:
    """Refuse files that are not here: with fewer, what is made of them would be different next time."""
    if missing := [file.name for file in files if file.path is None]:
        raise UserError(
            f"{where}: files of {wanted.repo} that are not here: {len(missing):,}, the first is {missing[0]}.",
            fix or how_to_fetch(wanted, context),
        )


def how_to_fetch(wanted: HubSet, context: TaskContext) -> str:
    """The command that fetches a data set."""
    keys = {"repo": wanted.repo, "revision": wanted.revision, "files": wanted.files}
    given = {"data": "hub"} | {f"data.{key}": value for key, value in keys.items() if value is not None}
    return f"Fetch it: nanochat-pl download {typed_keys(given | key_of_cache(context.cache_dir))}"


def _not_in_mirror(folder: Path | None, context: TaskContext) -> str:
    if folder is None or folder.is_dir():
        return ""
    if not folder.parents[1].is_dir():
        return f", and paths.hub={context.hub} is no mirror: it has no folder datasets"
    return f", and paths.hub={context.hub} does not have it"


def _in_mirror(where: str, folder: Path, wanted: HubSet, suffixes: Sequence[str]) -> list[SetFile]:
    key = f"{where}.{wanted.prefix}"
    found = files_on_disk(f"{key}repo", str(folder), suffixes)
    if wanted.files is None:
        return found
    chosen = [file for file in found if fnmatch.fnmatchcase(file.name, wanted.files)]
    if not chosen:
        near = did_you_mean(wanted.files, [file.name for file in found])
        raise UserError(f"{key}files={wanted.files!r}: {folder} has no such file; {near}")
    return chosen
