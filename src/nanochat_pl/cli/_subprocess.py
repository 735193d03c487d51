"""Runs a command in a process of its own: signals are handed on, and the child ends when its parent does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from nanochat_pl.common.constants import STOP_SIGNALS
from nanochat_pl.common.files import explain_disk_errors
from nanochat_pl.common.signals import heeded_signals

# Set for children: they end when their standard input does, that is, when their parent is gone; and they leave the
# closing words to it.
FOLLOW_PARENT = "NANOCHAT_PL_FOLLOW_PARENT"
# Its value for processes that a child of ours has launched: the launcher tells them to stop.
LAUNCHED = "launched"
# Names a folder in which launched processes note their exit codes: after a signal torch's launcher forgets them.
EXIT_CODES = "NANOCHAT_PL_EXIT_CODES"


def run_child(
    arguments: Sequence[str],
    parent: int | None = None,
    output: Path | None = None,
    watch: Callable[[], bool] | None = None,
) -> int:
    """Run ``nanochat-pl`` with these arguments and wait.

    The child has a session of its own, so a Ctrl-C reaches it once, through us. Its standard input is a pipe that
    nobody writes to: it closes when we are gone, whatever the reason, and the child then stops as on SIGTERM.

    Args:
        arguments: of ``nanochat-pl``.
        parent: a process whose child this one is, and whose end is the end of the child, too.
        output: a file that what the child prints is added to; None: it prints where this process does.
        watch: called once a second; where it says so, the child is told to stop.

    Returns:
        its exit code; 128 + n where signal n ended it, or was to end it: one that was sent to this process counts,
        however the child ended.
    """
    command = [sys.executable, "-m", "nanochat_pl.cli.main", *arguments]
    child: subprocess.Popen[bytes] | None = None
    pending: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        pending.append(number)
        if child is not None:
            child.send_signal(number)

    # What this process ignores the child ignores too.
    previous = {number: signal.signal(number, pass_on) for number in heeded_signals()}
    try:
        sys.stdout.flush()
        environment = {**os.environ, FOLLOW_PARENT: "1"}
        with _opened(output) as stream:
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=None if stream is None else subprocess.STDOUT,
                env=environment if stream is None else {**environment, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        for number in pending:  # one that came before the child was there
            child.send_signal(number)
        code = _wait(child, parent, watch)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if child.stdin is not None:
        child.stdin.close()
    code = code if code >= 0 else 128 - code
    if pending and not is_stop(code):  # it ended of itself, or was killed meanwhile; what would follow must not begin
        return 128 + pending[0]
    return code


@contextlib.contextmanager
def _opened(output: Path | None) -> Iterator[IO[bytes] | None]:
    if output is None:
        yield None
        return
    with explain_disk_errors(output), output.open("ab") as stream:
        yield stream


def _wait(child: subprocess.Popen[bytes], parent: int | None, watch: Callable[[], bool] | None) -> int:
    while True:
        try:
            # Not without end: of a signal that comes just before the wait begins, Python would hear when it is over.
            return child.wait(1.0)
        except subprocess.TimeoutExpired:
            if parent is not None and os.getppid() != parent and child.stdin is not None:
                child.stdin.close()
                parent = None
            if watch is not None and watch():
                child.terminate()
                watch = None


def is_stop(code: int) -> bool:
    """Whether an exit code is that of a process that was told to stop; one that was killed or crashed was not."""
    return code - 128 in STOP_SIGNALS


def note_exit(code: int) -> int:
    """Tell a launcher of ours with what this process ends; gives it back."""
    if folder := os.environ.get(EXIT_CODES):
        with contextlib.suppress(OSError):
            (Path(folder) / os.environ.get("RANK", "0")).write_text(str(code), encoding="utf-8")
    return code


def follows_stdin() -> bool:
    """Whether this process ends when its standard input does."""
    return os.environ.get(FOLLOW_PARENT) == "1"


def is_child() -> bool:
    """Whether this process was started by :func:`run_child`, or launched by one that was."""
    return FOLLOW_PARENT in os.environ
