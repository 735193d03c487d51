"""Data sets on a hub (Hugging Face's, or a mirror of it): what a revision holds, kept in a manifest.

Everything goes through huggingface_hub, so its variables hold: ``HF_ENDPOINT`` (a mirror), ``HF_HOME`` or
``HF_HUB_CACHE`` (where files are kept), ``HF_TOKEN``, ``HF_HUB_OFFLINE``, ``HF_HUB_DISABLE_XET``. It is imported inside
of functions only: that takes half a second, which no command should pay that does not need it.

A branch moves, so it is asked once for its commit. The manifest keeps that commit and all of its files, and later runs
keep to it until they are told to refresh. The network is used by :func:`open_manifest` (where nothing is known yet) and
by :mod:`~nanochat_pl.data.hub.download`; whatever else is here looks at the disk alone.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.common.files import read_json, write_json
from nanochat_pl.common.schema import build, setting, to_plain
from nanochat_pl.data.hub.errors import library_heard, patiently

_log = logging.getLogger(__name__)
_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True)
class Column:
    """A column of a table, and its bytes before they are compressed."""

    name: str
    bytes: int = setting(at_least=0)


@dataclass(frozen=True)
class HubFile:
    """A file of a commit.

    Attributes:
        path: inside of the data set, with slashes.
        git_blob: git's hash of what is stored: of the contents, or of the pointer to them where they are in LFS.
        sha256: of the contents; given by the hub for files in LFS, else known when it has been downloaded.
        row_groups, rows, columns: of a parquet file, known when it has been downloaded.
    """

    path: str
    bytes: int = setting(at_least=0)
    git_blob: str = ""
    sha256: str | None = None
    row_groups: int | None = None
    rows: int | None = None
    columns: tuple[Column, ...] = ()

    def column_bytes(self, name: str) -> int | None:
        """Bytes of a column before they are compressed; None where that is not known."""
        return next((column.bytes for column in self.columns if column.name == name), None)

    @property
    def contents(self) -> str:
        """What stands for the contents, the same before and after the download: of a file in git its own hash."""
        return self.git_blob if self.git_blob.startswith("git:") else str(self.sha256)


@dataclass(frozen=True)
class Manifest:
    """All files of one commit of a data set, by path in sorted order.

    Attributes:
        revision: what was asked for, e.g. ``main``.
        commit: what it meant when it was asked for.
        files: all of them, also those that are not here.
    """

    repo: str
    revision: str
    commit: str
    files: tuple[HubFile, ...]

    def file(self, path: str) -> HubFile:
        """The file of a path. Raises :class:`UserError` that names the nearest one."""
        return self.matching(path, "file")[0]

    def matching(self, pattern: str, key: str = "data.files") -> list[HubFile]:
        """The files whose path matches a glob (``*`` goes through folders too), in order; at least one.

        Raises:
            UserError: there is none; names ``key`` and the nearest path.
        """
        found = [file for file in self.files if file.path == pattern or fnmatch.fnmatchcase(file.path, pattern)]
        if not found:
            near = did_you_mean(pattern, [file.path for file in self.files]) if self.files else "it has no files at all"
            raise UserError(f"{key}={pattern!r}: {self.repo} (commit {self.commit[:12]}) has no such file; {near}")
        return found

    def at_hand(self, file: HubFile) -> Path | None:
        """Where a file lies, if it has been downloaded and has its size; its contents are not looked at."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, file.path, revision=self.commit, repo_type="dataset")
        path = Path(found) if isinstance(found, str) else None
        return path if path is not None and path.is_file() and path.stat().st_size == file.bytes else None


def known_manifest(repo: str, revision: str, cache_dir: Path) -> Manifest | None:
    """The manifest that an earlier download has kept; None without one."""
    path = _manifest_path(repo, revision, cache_dir)
    if not path.exists():
        return None
    try:
        return build(Manifest, read_json(path), str(path))
    except UserError as error:
        _log.warning("%s: is damaged and is asked for anew (%s)", path, error)
        return None


def open_manifest(repo: str, revision: str, cache_dir: Path, refresh: bool = False) -> Manifest:
    """The manifest of a data set; the hub is asked where there is none yet, or for a newer one with ``refresh``.

    Args:
        cache_dir: ``paths.cache``; manifests lie in its folder ``hub``.
        refresh: ask what the revision means today.

    Raises:
        UserError: there is no such data set or revision, or the hub cannot be asked.
    """
    known = known_manifest(repo, revision, cache_dir)
    if known is not None and not refresh:
        return known
    commit = commit_of(repo, revision)
    if known is not None and known.commit == commit:
        return known
    with library_heard():
        files = _list_files(repo, commit)
    return keep_manifest(Manifest(repo, revision, commit, files), cache_dir, known)


def keep_manifest(manifest: Manifest, cache_dir: Path, known: Manifest | None = None) -> Manifest:
    """Write a manifest, with what is known of the same files from an earlier one (default: the one on the disk)."""
    known = known or known_manifest(manifest.repo, manifest.revision, cache_dir)
    facts = {(file.path, file.contents): file for file in known.files if file.rows is not None} if known else {}
    files = tuple(facts.get((file.path, file.contents), file) if file.rows is None else file for file in manifest.files)
    manifest = dataclasses.replace(manifest, files=files)
    write_json(_manifest_path(manifest.repo, manifest.revision, cache_dir), to_plain(manifest))
    return manifest


def commit_of(repo: str, revision: str) -> str:
    """The commit that a revision means on the hub now; this is also the question whether the hub can be reached."""
    from huggingface_hub import HfApi

    def ask() -> str:
        api = HfApi()
        commit = api.dataset_info(repo, revision=revision, timeout=_TIMEOUT_SECONDS).sha
        if not commit:
            raise ValueError("it names no commit")
        return commit

    return patiently(ask, repo if revision == "main" else f"{repo}: {revision}")


def _list_files(repo: str, commit: str) -> tuple[HubFile, ...]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    def ask() -> list[HubFile]:
        api = HfApi()
        entries = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset")
        return [_hub_file(entry) for entry in entries if isinstance(entry, RepoFile)]

    def _hub_file(entry: RepoFile) -> HubFile:
        if entry.lfs is None:
            return HubFile(entry.path, entry.size, f"git:{entry.blob_id}")
        return HubFile(entry.path, entry.lfs.size, f"lfs:{entry.blob_id}", entry.lfs.sha256)

    return tuple(sorted(patiently(ask, repo), key=lambda file: file.path))


def _manifest_path(repo: str, revision: str, cache_dir: Path) -> Path:
    return cache_dir / "hub" / repo.replace("/", "--") / f"{quote(revision, safe='')}.json"
