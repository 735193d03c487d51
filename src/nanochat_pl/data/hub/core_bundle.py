"""The evaluation data of CORE, as it is published: one zip archive, fetched and unpacked into the cache folder."""

from __future__ import annotations

import errno
import http.client
import os
import shutil
import stat
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from nanochat_pl.common.console import progress, rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import explain_disk_errors, free_bytes, fsync_folder

EVAL_BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
NAME = "eval_bundle"
# The published archive is far below these.
MAX_ARCHIVE_BYTES = 512 * 2**20
MAX_UNPACKED_BYTES = 2 * 2**30
MAX_FILES = 1000
MAX_NAME_BYTES = 1000  # of a path in it
MAX_TRIES = 3
TIMEOUT_SECONDS = 30.0
_BLOCK = 2**20
_PARTS = ("core.yaml", "eval_meta_data.csv", "eval_data")


def bundle_in_cache(cache_dir: Path) -> Path:
    """Where the bundle lies that was downloaded, or will lie."""
    return cache_dir / NAME


def fetch_eval_bundle(cache_dir: Path, url: str = EVAL_BUNDLE_URL, refresh: bool = False) -> tuple[Path, bool]:
    """Have the evaluation bundle in the cache folder, whole or not at all.

    Args:
        cache_dir: ``paths.cache``.
        url: of the archive.
        refresh: fetch it although it is here.

    Returns:
        its folder, and whether it was fetched.

    Raises:
        UserError: it cannot be fetched or written, or the archive is not what it must be. What was there stays.
    """
    folder = bundle_in_cache(cache_dir)
    if folder.is_dir() and not refresh:
        return folder, False
    with explain_disk_errors(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=cache_dir) as temporary:
            archive = Path(temporary) / "archive.zip"
            _fetch_patiently(url, archive)
            unpacked = Path(temporary) / "unpacked"
            unpack(archive, unpacked, url)
            _replace(_root(unpacked, url), folder, Path(temporary) / "old")
            fsync_folder(cache_dir)
    return folder, True


def unpack(archive: Path, target: Path, name: str) -> None:
    """Unpack an archive that may come from an untrusted source: plain files inside of ``target``, of bounded size.

    Raises:
        UserError: it is damaged, leads out of ``target``, holds links, or is too large; names ``name`` and the entry.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            # An empty name is no folder's; ZipInfo.is_dir looks at its last sign.
            entries = [entry for entry in opened.infolist() if not entry.filename.endswith("/")]
            folders = [entry.filename for entry in opened.infolist() if entry.filename.endswith("/")]
            _require_harmless(entries, folders, name, free_bytes(target.parent))
            for entry in entries:
                _unpack_entry(opened, entry, target, name)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"{name}: is no whole zip archive: {error}", "Run the same command again.") from error


def _unpack_entry(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, name: str) -> None:
    path = target.joinpath(*PurePosixPath(entry.filename).parts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # An entry of more bytes than it says fails its checksum: no more than that are read.
        with opened.open(entry) as source, path.open("xb") as file:
            shutil.copyfileobj(source, file, _BLOCK)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise  # that is the disk's fault, not the archive's
        problem = f"{_shown(entry)} cannot be unpacked: {error.strerror or error}"
        raise UserError(f"{name}: {problem}; nothing is kept.") from error


def _require_harmless(entries: list[zipfile.ZipInfo], folders: list[str], name: str, room: int) -> None:
    if len(entries) > MAX_FILES:
        raise UserError(f"{name}: holds {len(entries):,} files, more than {MAX_FILES:,}.")
    names: set[tuple[str, ...]] = set()
    for entry in entries:
        path = PurePosixPath(entry.filename)
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if not path.parts:
            raise UserError(f"{name}: holds a file without a name, {entry.filename!r}; nothing was unpacked.")
        if len(os.fsencode(entry.filename)) > MAX_NAME_BYTES:
            raise UserError(f"{name}: {_shown(entry)} is too long a name; nothing was unpacked.")
        if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or ":" in entry.filename:
            raise UserError(f"{name}: {entry.filename!r} leads out of the folder; nothing was unpacked.")
        if kind not in (0, stat.S_IFREG):
            raise UserError(f"{name}: {entry.filename!r} is no plain file; nothing was unpacked.")
        parts = _place(entry.filename)
        if parts in names:
            raise UserError(f"{name}: holds two files of one name, {entry.filename!r}; nothing was unpacked.")
        names.add(parts)
    above = {parts[:length] for parts in names for length in range(1, len(parts))} | {*map(_place, folders)}
    if both := sorted(names & above):
        raise UserError(f"{name}: {'/'.join(both[0])[:80]!r} is a file and a folder; nothing was unpacked.")
    size = sum(entry.file_size for entry in entries)
    if size > MAX_UNPACKED_BYTES:
        raise UserError(f"{name}: would unpack to {size / 2**30:,.1f} GiB; nothing was unpacked.")
    if size > room:
        raise UserError(f"{name}: unpacks to {size / 2**20:,.0f} MiB, and {room / 2**20:,.0f} MiB are free.")


def _place(filename: str) -> tuple[str, ...]:
    """Where an entry lies, on a disk that does not tell capitals from small letters."""
    return tuple(part.casefold() for part in PurePosixPath(filename).parts)


def _shown(entry: zipfile.ZipInfo) -> str:
    """The name of an entry, of which a long one is cut."""
    return repr(entry.filename if len(entry.filename) <= 80 else f"{entry.filename[:80]}…")


def _root(unpacked: Path, name: str) -> Path:
    """The folder in what was unpacked that is the bundle."""
    for folder in (unpacked / NAME, unpacked):
        if all((folder / part).exists() for part in _PARTS):
            return folder
    raise UserError(f"{name}: holds no evaluation bundle, which has {', '.join(_PARTS)}.")


def _replace(new: Path, folder: Path, old: Path) -> None:
    if folder.exists():
        folder.rename(old)
    new.rename(folder)


def _fetch_patiently(url: str, path: Path) -> None:
    for number in range(1, MAX_TRIES + 1):
        try:
            return _fetch(url, path)
        except urllib.error.HTTPError as error:
            if error.code < 500 or number == MAX_TRIES:
                raise UserError(f"{url}: the server answers with error {error.code}.", _offline()) from error
            reason = f"the server answers with error {error.code}"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
            if number == MAX_TRIES:
                raise UserError(f"{url}: cannot be fetched: {reason}.", _offline()) from error
        seconds = 2 ** (number - 1)
        rank_zero_print(f"{url}: {reason}; trying again in {seconds} s ({number} of {MAX_TRIES - 1}).")
        time.sleep(seconds)
    raise AssertionError("the last try returns or raises")


def _fetch(url: str, path: Path) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response, path.open("wb") as file:
        total = int(response.headers.get("Content-Length") or 0)
        if total > MAX_ARCHIVE_BYTES:
            raise UserError(f"{url}: {total / 2**20:,.0f} MiB, more than such an archive has.")
        received = 0
        with progress("downloading the evaluation bundle", total, "bytes") as advance:
            while block := response.read(_BLOCK):
                received += len(block)
                if received > MAX_ARCHIVE_BYTES:
                    raise UserError(f"{url}: more than {MAX_ARCHIVE_BYTES / 2**20:,.0f} MiB came.")
                file.write(block)
                advance(len(block))
        if received < total:
            raise http.client.IncompleteRead(b"", total - received)


def _offline() -> str:
    return "Without a network: core.path=FOLDER names a folder that has core.yaml, eval_meta_data.csv and eval_data."
