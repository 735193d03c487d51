"""The evaluation data of CORE, as it is published: one zip archive, fetched and unpacked into the cache folder."""

from __future__ import annotations

import errno
import lzma
import os
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from nanochat_pl.common.console import progress
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import explain_disk_errors, free_bytes, fsync_folder
from nanochat_pl.data.hub.errors import patiently

EVAL_BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
NAME = "eval_bundle"
# The published archive is far below these.
MAX_ARCHIVE_BYTES = 512 * 2**20
MAX_UNPACKED_BYTES = 2 * 2**30
MAX_FILES = 1000
MAX_NAME_BYTES = 1000  # of a path in it
TIMEOUT_SECONDS = 30.0
_PARTS = ("core.yaml", "eval_meta_data.csv", "eval_data")
_OTHERWISE = (
    "Run it again later, or set core.path=FOLDER to a folder that has core.yaml, eval_meta_data.csv and eval_data."
)


def bundle_in_cache(cache_dir: Path) -> Path:
    """Where the bundle lies that was downloaded, or will lie."""
    return cache_dir / NAME


def fetch_eval_bundle(cache_dir: Path, url: str = EVAL_BUNDLE_URL, refresh: bool = False) -> tuple[Path, bool]:
    """Have the evaluation bundle in the cache folder, whole or not at all.

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
            archive, unpacked = Path(temporary) / "archive.zip", Path(temporary) / "unpacked"
            patiently(lambda: _fetch(url, archive), url, _OTHERWISE)
            _unpack(archive, unpacked, url)
            new = next((each for each in (unpacked / NAME, unpacked) if all((each / p).exists() for p in _PARTS)), None)
            if new is None:
                raise UserError(f"{url}: holds no evaluation bundle, which has {', '.join(_PARTS)}.")
            if folder.exists():
                folder.rename(Path(temporary) / "old")
            new.rename(folder)
            fsync_folder(cache_dir)
    return folder, True


def _fetch(url: str, path: Path) -> None:
    from huggingface_hub import get_session

    with (
        get_session().stream("GET", url, timeout=TIMEOUT_SECONDS) as response,
        progress(
            "downloading the evaluation bundle", int(response.headers.get("Content-Length") or 0), "bytes"
        ) as advance,
    ):
        response.raise_for_status()
        # Here: to patiently() a full disk is that of the hub's cache.
        with explain_disk_errors(path), path.open("wb") as file:
            for block in response.iter_raw():
                if file.tell() + len(block) > MAX_ARCHIVE_BYTES:
                    raise UserError(f"{url}: has more than {MAX_ARCHIVE_BYTES / 2**20:,.0f} MiB.")
                file.write(block)
                advance(len(block))


def _unpack(archive: Path, target: Path, name: str) -> None:
    """Unpack an archive that may come from an untrusted source: plain files inside of ``target``, of bounded size.

    zipfile writes of each no more bytes than its entry tells.

    Raises:
        UserError: it is damaged, leads out of ``target``, holds links, or is too large; names ``name`` and the entry.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = opened.infolist()
            size = sum(entry.file_size for entry in entries)
            if len(entries) > MAX_FILES or size > MAX_UNPACKED_BYTES:
                raise UserError(
                    f"{name}: would unpack to {len(entries):,} files of {size / 2**20:,.0f} MiB, more than"
                    f" {MAX_FILES:,} files or {MAX_UNPACKED_BYTES / 2**20:,.0f} MiB; nothing was unpacked."
                )
            _require_harmless(entries, name)
            if size > (free := free_bytes(target.parent)):
                raise UserError(f"{name}: unpacks to {size / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free.")
            for entry in entries:
                _unpack_entry(opened, entry, target, name)
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
    ) as error:
        raise UserError(f"{name}: is no whole zip archive: {error}", "Run the same command again.") from error


def _unpack_entry(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, name: str) -> None:
    try:
        opened.extract(entry, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise  # that is the disk's fault, not the archive's
        problem = f"{_shown(entry)} cannot be unpacked: {error.strerror or error}"
        raise UserError(f"{name}: {problem}; nothing is kept.") from error


def _require_harmless(entries: Sequence[zipfile.ZipInfo], name: str) -> None:
    """Refuse names that zipfile would change, and files of one name, of which it would keep the last."""
    files: set[tuple[str, ...]] = set()
    for entry in entries:
        path, kind = PurePosixPath(entry.filename), stat.S_IFMT(entry.external_attr >> 16)
        if not path.parts:
            raise UserError(f"{name}: holds a file without a name, {entry.filename!r}; nothing was unpacked.")
        if len(os.fsencode(entry.filename)) > MAX_NAME_BYTES:
            raise UserError(f"{name}: {_shown(entry)} is too long a name; nothing was unpacked.")
        if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or ":" in entry.filename:
            raise UserError(f"{name}: {entry.filename!r} leads out of the folder; nothing was unpacked.")
        if _is_folder(entry):
            continue
        if kind not in (0, stat.S_IFREG):
            raise UserError(f"{name}: {entry.filename!r} is no plain file; nothing was unpacked.")
        if (parts := _place(entry)) in files:
            raise UserError(f"{name}: holds two files of one name, {entry.filename!r}; nothing was unpacked.")
        files.add(parts)
    above = {parts[:length] for parts in files for length in range(1, len(parts))}
    if both := sorted(files & (above | {_place(entry) for entry in entries if _is_folder(entry)})):
        raise UserError(f"{name}: {'/'.join(both[0])[:80]!r} is a file and a folder; nothing was unpacked.")


def _is_folder(entry: zipfile.ZipInfo) -> bool:
    return entry.filename.endswith("/")  # ZipInfo.is_dir() looks at the last sign of a name, and one may be empty


def _place(entry: zipfile.ZipInfo) -> tuple[str, ...]:
    """Where an entry lies, on a disk that does not tell capitals from small letters."""
    return tuple(part.casefold() for part in PurePosixPath(entry.filename).parts)


def _shown(entry: zipfile.ZipInfo) -> str:
    """The name of an entry, of which a long one is cut."""
    return repr(entry.filename if len(entry.filename) <= 80 else f"{entry.filename[:80]}…")
