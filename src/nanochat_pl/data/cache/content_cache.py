"""Cache folders: some files and a manifest that is written last. What a manifest does not vouch for is not there.

Contents are a pure function of the key, so two processes that fill the same folder at once write the same bytes, each
file is renamed into place whole, and it does not matter who wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import explain_disk_errors, read_json, sha256_of_file, write_atomically, write_json
from nanochat_pl.common.locks import try_lock

_log = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
_SEAL = "check"  # SHA-256 of the rest of an object
# A file may change again without a new time stamp while the clock of the file system stands still.
_CLOCK_STEP_SECONDS = 2.0
_ABANDONED_SECONDS = 24 * 3600.0
_LOOK_AGAIN_SECONDS = 0.1
_PATIENCE_SECONDS = 5.0
_held_here: set[Path] = set()  # folders that threads of this process hold
_one_at_a_time = threading.Lock()


def fingerprint_of(*parts: Any) -> str:
    """SHA-256 of plain data (what JSON can say), as hexadecimal text."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode("utf-8")).hexdigest()


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object that vouches for itself: :func:`read_sealed` notices a byte that has changed."""
    plain = json.loads(json.dumps(dict(value)))  # as it will be read
    write_json(path, {**plain, _SEAL: fingerprint_of(plain)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what :func:`write_sealed` wrote, without its seal. Files of earlier versions, which have none, are taken.

    Raises:
        UserError: it is missing, no JSON object, or not what was written.
    """
    value = read_json(path)
    seal = value.pop(_SEAL, None) if isinstance(value, dict) else ""
    if seal is not None and seal != fingerprint_of(value):
        raise UserError(f"{path}: is damaged: it is not what was written.")
    return dict(value)


def file_sha256(path: Path, cache_dir: Path, at_rest: bool = False) -> str:
    """As :func:`known_sha256`, of any file, remembered in ``cache_dir``."""
    path = path.resolve()
    return known_sha256(path, cache_dir / "file_hashes" / f"{fingerprint_of(str(path))[:32]}.json", at_rest)


def known_sha256(path: Path, memo: Path, at_rest: bool = False) -> str:
    """SHA-256 of a file's contents, which is read only when the file is not the one that ``memo`` remembers.

    Size, inode and both times of a file (nobody sets the change time back) tell whether it is the same. ``at_rest``:
    the caller knows that nobody writes to it, however young it is.
    """
    before = _identity(path)
    with contextlib.suppress(UserError, KeyError, TypeError):
        remembered = read_sealed(memo)
        if remembered["identity"] == before:
            return str(remembered["sha256"])
    digest = sha256_of_file(path)
    old_enough = at_rest or time.time() - path.stat().st_mtime > _CLOCK_STEP_SECONDS
    if _identity(path) == before and old_enough:
        with contextlib.suppress(UserError):  # a cache on a read-only disk can still be used
            write_sealed(memo, {"identity": before, "sha256": digest})
    return digest


def _identity(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def write_cache(folder: Path, key: Any, files: Mapping[str, Callable[[Path], None]], facts: Mapping[str, Any]) -> None:
    """Fill a cache folder.

    Args:
        folder: made where it is missing; what it holds is replaced.
        key: plain data of which the contents are a function.
        files: name → what writes it to a path; in this order.
        facts: plain data for the manifest; read after all files are written, so that writers may fill it.
    """
    _remove_abandoned(folder)
    vouched = {}
    for name, write in files.items():
        path = folder / name
        write_atomically(path, write)
        # Nobody writes to a file that has its name. Remembered now, it is not read again when it is first used.
        sha256 = known_sha256(path, _memo(path), at_rest=True)
        vouched[name] = {"bytes": path.stat().st_size, "sha256": sha256}
    write_sealed(folder / _MANIFEST, {"key": key, "files": vouched, "facts": dict(facts)})


def read_cache(folder: Path, key: Any) -> dict[str, Any] | None:
    """The facts of a cache folder whose files are all as they were written; None where there is no such cache."""
    if not (folder / _MANIFEST).exists():
        return None
    try:
        manifest = read_sealed(folder / _MANIFEST)
        if manifest["key"] != json.loads(json.dumps(key)):
            return None
        for name, vouched in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != vouched["bytes"]:
                raise ValueError(f"{name} has {path.stat().st_size:,} bytes and not {vouched['bytes']:,}")
            if known_sha256(path, _memo(path)) != vouched["sha256"]:
                raise ValueError(f"{name} is not what was written")
        return dict(manifest["facts"])
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s: the cache is damaged (%s) and is made again", folder, error)
        return None


@contextlib.contextmanager
def building(folder: Path, check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a folder while it is filled: other threads and processes that want the same wait, and find it filled.

    Args:
        check: called again and again while it waits; what it raises ends the waiting.

    Raises:
        UserError: the folder cannot be written to or locked.
    """
    with explain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    begin, told = time.monotonic(), False
    while (lock := _try_to_hold(folder)) is None:
        check()
        if not told and time.monotonic() - begin > _PATIENCE_SECONDS:
            told = True
            rank_zero_print(f"Waiting for another run, which is filling {folder}.")
        time.sleep(_LOOK_AGAIN_SECONDS)
    try:
        with lock:
            yield
    finally:
        _held_here.remove(folder)


def _try_to_hold(folder: Path) -> IO[str] | None:
    """The lock of a folder, to be closed in the end; None where another thread or process has it."""
    with _one_at_a_time, contextlib.ExitStack() as stack:
        # Of a process's threads one alone may open the file: whichever closes it lets go of the lock for all.
        if folder in _held_here:
            return None
        with explain_disk_errors(folder):
            lock = stack.enter_context((folder / "lock").open("a", encoding="utf-8"))
        if not try_lock(lock):
            return None
        stack.pop_all()
        _held_here.add(folder)
        return lock


def _memo(path: Path) -> Path:
    return path.with_name(f"{path.name}.verified")


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed writers left; younger files may belong to a process that is at work."""
    for path in folder.glob("*.tmp.*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
