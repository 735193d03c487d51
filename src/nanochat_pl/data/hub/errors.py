"""What goes wrong between us and a hub: what is worth another try, and how the rest is said.

huggingface_hub itself waits and tries again where a rate limit or a broken connection meets a download, and goes on
where that broke off. What is left is dealt with here.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError, first_line
from nanochat_pl.common.files import free_bytes

T = TypeVar("T")
MAX_TRIES = 3
# A hub that asks for more patience than this has shut the door for today.
MAX_WAIT_SECONDS = 900.0
_OFFLINE = (
    "Without a network: data=python_docs needs none, data=local reads files of your own; what has been downloaded "
    "is used as it is. HF_ENDPOINT=… names a mirror, HF_HUB_OFFLINE=1 forbids all requests."
)


class DamagedFile(Exception):
    """A file came whole by its size and is not what the hub has."""


def patiently(call: Callable[[], T], subject: str) -> T:
    """The result of a call to huggingface_hub; what may pass is tried again, a bounded number of times, and said.

    Args:
        call: asks the hub for something; may be called several times.
        subject: what is asked for, as messages name it: ``owner/name``, ``owner/name: file``.

    Raises:
        UserError: it did not work out; names the subject, the reason and the way out.
    """
    from huggingface_hub.errors import HTTPError

    for number in range(1, MAX_TRIES + 1):
        try:
            return call()
        except (OSError, HTTPError, ValueError, RuntimeError, DamagedFile) as error:
            seconds = _seconds_to_wait(error, number)
            if seconds is None or number == MAX_TRIES:
                raise _explained(error, subject) from error
            rank_zero_print(f"{subject}: {_short(error)}; trying again in {seconds:g} s ({number} of {MAX_TRIES - 1}).")
            time.sleep(seconds)
    raise AssertionError("the last try returns or raises")


@contextlib.contextmanager
def library_heard() -> Iterator[None]:
    """Say what huggingface_hub warns of (it waits, it goes on after a break) as lines of ours, without secrets."""

    class Says(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines = [re.sub(r"\?\S+", "", line) for line in record.getMessage().splitlines() if line.strip()]
            rank_zero_print(f"huggingface_hub: {' '.join(lines)}")

    logger = logging.getLogger("huggingface_hub")
    before, logger.handlers = logger.handlers, [Says(logging.WARNING)]
    try:
        yield
    finally:
        logger.handlers = before


def _seconds_to_wait(error: Exception, number: int) -> float | None:
    """How long to wait before another try; None: it would be of no use."""
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    usual = float(2 ** (number - 1))
    status = _status(error)
    if status is not None:
        if status not in (408, 429) and status < 500:
            return None
        asked = error.response.headers.get("Retry-After", "")  # type: ignore[attr-defined]
        seconds = float(asked) if asked.isdigit() else usual
        return seconds if seconds <= MAX_WAIT_SECONDS else None
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return None  # the library has tried long enough, or may not try
    if isinstance(error, OSError):
        return usual if _is_size_mismatch(error) else None
    if isinstance(error, DamagedFile):
        return usual if number == 1 else None
    # A connection, or one that a neighbouring thread has closed after an error of its own.
    return usual if isinstance(error, (HTTPError, RuntimeError)) else None


def _explained(error: Exception, subject: str) -> UserError:
    """What went wrong, for people."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, status = subject.partition(":")[0], _status(error)
    token = "set HF_TOKEN=… to a token of an account that may read it (or: hf auth login)."
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _explained(error.__cause__, subject)
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return UserError(f"{subject}: is not here yet, and HF_HUB_OFFLINE forbids to ask for it.", _OFFLINE)
    if isinstance(error, GatedRepoError):
        conditions = f"Accept them on https://huggingface.co/datasets/{repo}, then {token}"
        return UserError(f"{subject}: is gated: its owners want their conditions accepted first (401).", conditions)
    if isinstance(error, RepositoryNotFoundError):
        private = f"Look at data.repo; where it is private, {token}"
        return UserError(
            f"{subject}: the hub has no such data set, or shows it to its owners only ({status}).", private
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{subject}: has no such revision ({status}).", "Look at data.revision; null means main.")
    if isinstance(error, EntryNotFoundError):
        return UserError(f"{subject}: there is no such file (any more) on the hub ({status}).", _refresh(repo))
    if status in (401, 403):
        return UserError(f"{subject}: the hub refuses it ({status}).", f"To read it {token}")
    if status == 404:
        return UserError(
            f"{subject}: the hub does not know it (404).", "Look at data.repo, data.revision, HF_ENDPOINT."
        )
    if status == 429:
        asked = error.response.headers.get("Retry-After")  # type: ignore[attr-defined]
        after = f" in {asked} seconds" if asked else " later"
        return UserError(f"{subject}: too many requests (429).", f"Run the same command again{after}; {token}")
    if status is not None:
        return UserError(f"{subject}: the hub answers with error {status}.", "Run the same command again later.")
    return _explained_without_answer(error, subject, isinstance(error, HTTPError))


def _explained_without_answer(error: Exception, subject: str, is_connection: bool) -> UserError:
    if isinstance(error, DamagedFile):
        return UserError(f"{subject}: {error}, twice.", "Try another network, or another HF_ENDPOINT.")
    if is_connection:
        return UserError(f"{subject}: the hub cannot be reached: {_short(error)}", _OFFLINE)
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return disk_full(subject)
        if _is_size_mismatch(error):
            return UserError(f"{subject}: the download was cut off: {_short(error)}", "Run the same command again.")
        return UserError(
            f"{error.filename or subject}: {_short(error)}", "HF_HOME=… names another folder for downloads."
        )
    return UserError(
        f"{subject}: the answer is not that of a hub: {_short(error)}",
        "Look at data.repo (OWNER/NAME) and HF_ENDPOINT; a login page of the network may stand in between.",
    )


def disk_full(subject: str, needed: int | None = None) -> UserError:
    """The disk of downloads cannot hold them (``needed`` bytes)."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    size = "" if needed is None else f"{needed / 1e9:,.2f} GB are needed, "
    return UserError(
        f"{subject}: the disk of {folder} is full: {size}{free_bytes(folder) / 1e9:,.2f} GB are free.",
        "Fetch fewer (num_shards=…), free some space, or name another folder: HF_HOME=… nanochat-pl …",
    )


def _refresh(repo: str) -> str:
    return f"If {repo} has changed, take its newest revision: nanochat-pl download … refresh=true"


def _status(error: Exception) -> int | None:
    """The HTTP status that came, None where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_size_mismatch(error: OSError) -> bool:
    return str(error).startswith("Consistency check failed")


def _short(error: Exception) -> str:
    if (status := _status(error)) is not None:
        return f"the hub answers with error {status}"
    return first_line(error).rstrip(".")
