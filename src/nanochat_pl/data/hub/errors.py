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
from typing import Any, TypeVar

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
_TOKEN = "set HF_TOKEN=… to a token of an account that may read it (or: hf auth login)."


class DamagedFile(OSError):
    """A file came whole by its size and is not what the hub has."""


def patiently(call: Callable[[], T], subject: str, fix: str = "") -> T:
    """The result of a request; what may pass is tried again, a bounded number of times, and said.

    Args:
        call: asks a server for something through huggingface_hub; may be called several times.
        subject: what is asked for, as messages name it: ``owner/name``, ``owner/name: file``.
        fix: the way out, where it is not that of a data set of the hub.

    Raises:
        UserError: it did not work out; names the subject, the reason and the way out.
    """
    from huggingface_hub.errors import HTTPError

    for number in range(1, MAX_TRIES + 1):
        try:
            return call()
        except (OSError, HTTPError, ValueError, RuntimeError) as raised:
            error: Exception = raised
            # With force_download huggingface_hub says of any failure that there is an error above.
            if isinstance(raised, ValueError) and isinstance(raised.__cause__, (OSError, HTTPError)):
                error = raised.__cause__
            seconds = _seconds_to_wait(error, 2.0 ** (number - 1))
            if seconds is None or number == MAX_TRIES:
                problem, usual_fix = _explained(error, subject)
                raise UserError(problem, fix or usual_fix) from error
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


def require_room(repo: str, num_bytes: int) -> None:
    """Raise :class:`UserError` where the disk of the hub's cache has no room for so many bytes."""
    if free_bytes(_cache()) < num_bytes:
        raise UserError(*_disk_full(repo, f"{num_bytes / 1e9:,.2f} GB are needed, "))


def _seconds_to_wait(error: Exception, usual: float) -> float | None:
    """How long to wait before another try; None: it would be of no use."""
    from huggingface_hub.errors import HTTPError

    if (status := _status(error)) is not None:
        asked = _retry_after(error)
        seconds = float(asked) if asked.isdigit() else usual
        return seconds if (status in (408, 429) or status >= 500) and seconds <= MAX_WAIT_SECONDS else None
    if isinstance(error, OSError):
        return usual if _is_damaged(error) else None
    # A connection, or one that a neighbouring thread has closed after an error of its own.
    return usual if isinstance(error, (HTTPError, RuntimeError)) else None


def _explained(error: Exception, subject: str) -> tuple[str, str]:
    """What went wrong and what to do, for people."""
    from huggingface_hub import errors

    # What huggingface_hub could not fetch it says to be missing on the disk.
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    repo, status = subject.partition(":")[0], _status(error)
    for kind, problem, fix in (
        (
            errors.GatedRepoError,
            "is gated: its owners want their conditions accepted first",
            f"Accept them on https://huggingface.co/datasets/{repo}, then {_TOKEN}",
        ),
        (
            errors.RepositoryNotFoundError,
            "the hub has no such data set, or shows it to its owners only",
            f"Look at data.repo; where it is private, {_TOKEN}",
        ),
        (errors.RevisionNotFoundError, "has no such revision", "Look at data.revision; null means main."),
        (
            errors.RemoteEntryNotFoundError,
            "there is no such file (any more) on the hub",
            f"If {repo} has changed, take its newest revision: nanochat-pl download … refresh=true",
        ),
    ):
        if isinstance(error, kind):
            return f"{subject}: {problem} ({status}).", fix
    if status is not None:
        named = {401: "the hub refuses it", 403: "the hub refuses it", 429: "too many requests"}
        reason = f"{named[status]} ({status})" if status in named else _short(error)
        later = f"in {asked} seconds" if (asked := _retry_after(error)) else "later"
        return f"{subject}: {reason}.", f"Run the same command again {later}; {_TOKEN}"
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        return f"{subject}: is not here yet, and HF_HUB_OFFLINE forbids to ask for it.", _OFFLINE
    if isinstance(error, errors.HTTPError):
        return f"{subject}: the server cannot be reached: {_short(error)}", _OFFLINE
    if not isinstance(error, OSError):
        fix = "Look at data.repo (OWNER/NAME) and HF_ENDPOINT; a login page of the network may stand in between."
        return f"{subject}: the answer is not that of a hub: {_short(error)}", fix
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _disk_full(subject)
    if _is_damaged(error):
        return f"{subject}: came damaged: {_short(error)}", "Try another network, or another HF_ENDPOINT."
    return f"{error.filename or subject}: {_short(error)}", "HF_HOME=… names another folder for downloads."


def _disk_full(subject: str, needed: str = "") -> tuple[str, str]:
    return (
        f"{subject}: the disk of {_cache()} is full: {needed}{free_bytes(_cache()) / 1e9:,.2f} GB are free.",
        "Fetch fewer (num_shards=…), free some space, or name another folder: HF_HOME=… nanochat-pl …",
    )


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _is_damaged(error: OSError) -> bool:
    return isinstance(error, DamagedFile) or str(error).startswith("Consistency check failed")


def _status(error: Exception) -> int | None:
    """The HTTP status that came, None where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _retry_after(error: Any) -> str:
    return str(error.response.headers.get("Retry-After", ""))


def _short(error: Exception) -> str:
    if (status := _status(error)) is not None:
        return f"the server answers with error {status}"
    return first_line(error).rstrip(".")
