"""The evaluation data of CORE, as it is published: one zip archive, fetched and unpacked into the cache folder."""

from __future__ import annotations

import errno
import lzma
import tempfile
import zipfile
import zlib
from pathlib import Path

from nanochat_pl.common.console import progress
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import explain_disk_errors, fsync_folder
from nanochat_pl.data.hub.errors import patiently

EVAL_BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
NAME = "eval_bundle"
# The published archive is far below these.
MAX_ARCHIVE_BYTES = 512 * 2**20
MAX_UNPACKED_BYTES = 2 * 2**30
MAX_FILES = 1000
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
    """Unpack an archive that may come from an untrusted source: at most so many files, of bounded size.

    Whatever the archive says, zipfile writes plain files inside of ``target`` alone, and of each no more bytes than its
    entry tells.
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
            opened.extractall(target)
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
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise  # that is the disk's fault, not the archive's
        raise UserError(f"{name}: cannot be unpacked: {error.strerror or error}; nothing is kept.") from error
