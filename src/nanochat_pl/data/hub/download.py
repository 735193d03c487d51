"""Files of a hub, several at once, each verified before it counts."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_pl.common.console import Advance, counted_bytes, rank_zero_print
from nanochat_pl.data.cache.content_cache import file_sha256
from nanochat_pl.data.files.read import parquet_facts
from nanochat_pl.data.hub.errors import DamagedFile, library_heard, patiently, require_room
from nanochat_pl.data.hub.manifest import Column, HubFile, Manifest, commit_of, keep_manifest

PARALLEL = 8


@dataclass(frozen=True)
class Fetched:
    """What a download has done.

    Attributes:
        paths: where the files lie, in the order in which they were asked for.
        manifest: with what is now known of them.
        num_new: how many were not here before, or were damaged.
    """

    paths: tuple[Path, ...]
    manifest: Manifest
    num_new: int
    new_bytes: int


def fetch_files(manifest: Manifest, files: Sequence[HubFile], cache_dir: Path, parallel: int = PARALLEL) -> Fetched:
    """Have files of a data set on the disk, verified by size and hash.

    What is here and right is left alone. What the hub sends damaged is fetched a second time. The network is not used
    where nothing is missing. Whatever ends this early leaves whole files, and called again it goes on with the others.

    Raises:
        UserError: no network, too little room on the disk, or what the hub says; names the file.
    """
    have: dict[str, tuple[HubFile, Path]] = {}

    def verify(file: HubFile, advance: Advance) -> None:
        path = manifest.at_hand(file)
        if path is not None and (verified := _verified(file, path, cache_dir)):
            have[file.path] = (verified, path)
        advance(file.bytes)

    def download(file: HubFile, advance: Advance) -> None:
        have[file.path] = _download(manifest, file, cache_dir, advance)

    try:
        _for_each(verify, files, f"verifying {manifest.repo}", parallel)
        missing = [file for file in files if file.path not in have]
        new_bytes = sum(file.bytes for file in missing)
        if missing:
            commit_of(manifest.repo, manifest.commit)  # one question before many
            require_room(manifest.repo, new_bytes)
            with library_heard():
                _for_each(download, missing, f"downloading {manifest.repo}", parallel)
    finally:
        if any(have.get(file.path, (file,))[0] != file for file in files):
            facts = {path: verified for path, (verified, _) in have.items()}
            files_now = tuple(facts.get(file.path, file) for file in manifest.files)
            manifest = keep_manifest(dataclasses.replace(manifest, files=files_now), cache_dir)
    return Fetched(tuple(have[file.path][1] for file in files), manifest, len(missing), new_bytes)


_recording = threading.Lock()  # of several threads of a process one alone writes what it has learnt of its file


def fetch_file(manifest: Manifest, file: HubFile, cache_dir: Path) -> tuple[HubFile, Path]:
    """As :func:`fetch_files`, of one file, and without a bar: for a process that works beside the training.

    Returns:
        the file with what is now known of it, and where it lies.
    """
    path = manifest.at_hand(file)
    if path is None or (verified := _verified(file, path, cache_dir)) is None:
        verified, path = _download(manifest, file, cache_dir, lambda num_bytes: None)
    if verified != file:
        with _recording:
            files = tuple(verified if each.path == file.path else each for each in manifest.files)
            keep_manifest(dataclasses.replace(manifest, files=files), cache_dir)
    return verified, path


def _verified(file: HubFile, path: Path, cache_dir: Path) -> HubFile | None:
    """The file with all that is known of it, now that it is here; None where it is not what the hub has."""
    if path.stat().st_size != file.bytes:
        return None
    # Such a file is never written to: another one takes its place.
    sha256 = file_sha256(path, cache_dir, at_rest=True)
    if file.sha256 is None:
        if f"git:{_git_blob_hash(path)}" != file.git_blob:
            return None
    elif sha256 != file.sha256:
        return None
    if file.rows is not None or not path.name.endswith(".parquet"):
        return dataclasses.replace(file, sha256=sha256)
    row_groups, rows, sizes = parquet_facts(path)
    columns = tuple(Column(name, size) for name, size in sizes.items())
    return dataclasses.replace(file, sha256=sha256, row_groups=row_groups, rows=rows, columns=columns)


def _git_blob_hash(path: Path) -> str:
    """What git calls a file of these contents: SHA-1 of its size and them. Files outside of LFS are small."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False).hexdigest()


def _download(manifest: Manifest, file: HubFile, cache_dir: Path, advance: Advance) -> tuple[HubFile, Path]:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repo, commit = manifest.repo, manifest.commit
    # What lies there is not it, or it would not be asked for.
    in_the_way = try_to_load_from_cache(repo, file.path, revision=commit, repo_type="dataset") is not None
    if in_the_way:
        rank_zero_print(f"{repo}: {file.path} is damaged on the disk and is fetched again.")
    received = 0

    def receive(num_bytes: int) -> None:
        nonlocal received
        received += num_bytes
        advance(num_bytes)

    def attempt() -> tuple[HubFile, Path]:
        nonlocal in_the_way
        receive(-received)
        found = hf_hub_download(
            repo,
            file.path,
            revision=commit,
            repo_type="dataset",
            force_download=in_the_way,
            tqdm_class=_bar_that_reports(receive),
        )
        in_the_way = True
        if verified := _verified(file, Path(found), cache_dir):
            return verified, Path(found)
        raise DamagedFile("what came is not what the hub lists by size and hash")

    result = patiently(attempt, f"{repo}: {file.path}")
    receive(file.bytes - received)
    return result


def _bar_that_reports(receive: Advance) -> Any:
    """A progress bar that draws nothing and hands on the bytes that came."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += int(n or 0)
            receive(int(n or 0))

    return Bar


def _for_each(work: Callable[[HubFile, Advance], None], files: Sequence[HubFile], what: str, parallel: int) -> None:
    """Do some work for each file in several threads. At an error those that are under way are finished first."""
    stop = threading.Event()

    def count(amount: int) -> None:
        if stop.is_set():
            raise KeyboardInterrupt  # in a thread, which ends there
        advance(amount)

    with counted_bytes(what, sum(file.bytes for file in files)) as advance:
        pool = ThreadPoolExecutor(parallel)
        try:
            for future in as_completed([pool.submit(work, file, count) for file in files]):
                future.result()
        except KeyboardInterrupt:
            stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
