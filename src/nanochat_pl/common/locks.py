"""Locks on files. The operating system lets go of them however their holder ends, so a lock that is held has a living
owner."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from nanochat_pl.common.errors import UserError

if sys.platform == "win32":
    import msvcrt

    def try_lock(file: IO[str]) -> bool:
        """Lock an open file for this process until it is closed; False where another process has it."""
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def try_lock(file: IO[str]) -> bool:
        """Lock an open file for this process until it is closed; False where another process has it.

        Threads of one process do not keep each other out, and closing the file once more lets go of it.

        Raises:
            UserError: the file system has no locks.
        """
        # A record lock, not flock: loader processes that outlive a killed run for a moment do not hold it.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise UserError(
                f"{file.name}: cannot be locked: {error.strerror or error}",
                fix="Give a folder on another file system: paths.cache=… (caches), paths.runs=… (runs).",
            ) from error
        return True


@contextlib.contextmanager
def held_lock(path: Path, patience_seconds: float = 30.0) -> Iterator[None]:
    """Hold the lock of a file for the moment in which something beside it is read and written.

    Args:
        path: of the file, which is made.
        patience_seconds: how long to wait for others.

    Raises:
        UserError: another process has held it for so long.
    """
    deadline = time.monotonic() + patience_seconds
    with path.open("a", encoding="utf-8") as file:
        while not try_lock(file):
            if time.monotonic() > deadline:
                raise UserError(f"{path}: another process has held it for {patience_seconds:.0f} seconds.")
            time.sleep(0.01)
        yield
