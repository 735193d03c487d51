"""Commands of nanochat_pl at the price of a fork: a process that has imported everything, and run nothing of it.

``python -m tests.helpers.fork_server`` reads orders, one JSON object a line, and answers each with the exit code of a
child that carried it out: a copy of the process, without threads.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MODULES = (
    "nanochat_pl.cli.train",
    "nanochat_pl.training.run",
    "nanochat_pl.cli._warnings",
    "tests.helpers.crash_points",
)


class ForkServer:
    """The other end of it, of :func:`fork_server`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(
        self,
        arguments: Sequence[str],
        log: Path,
        watch: dict[str, Any] | None = None,
        kill_after: float | None = None,
    ) -> int:
        """Run a command; gives its exit code, or minus the signal that killed it.

        Args:
            arguments: of ``nanochat-pl``.
            log: takes what it prints.
            watch: of :func:`tests.helpers.crash_points.install`, where it is to be watched.
            kill_after: seconds, after which it is killed; None: never.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {"arguments": [*arguments], "log": str(log), "watch": watch, "kill_after": kill_after}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        try:
            answer = self._process.stdout.readline()
        except BaseException:  # of a test's time limit: what comes late would be taken for the next answer
            self._process.kill()
            raise
        assert answer, "the fork server is gone"
        return int(answer)


@contextlib.contextmanager
def fork_server() -> Iterator[ForkServer]:
    """A server that ends with the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.fork_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    ) as process:
        try:
            yield ForkServer(process)
        finally:
            process.kill()


def _serve() -> None:
    for name in MODULES:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a child would have locks that nobody lets go of"
    gc.freeze()  # a child that collects garbage would copy all of it
    while line := sys.stdin.readline():
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _obey(order)
        print(_wait_for(child, order["kill_after"]), flush=True)


def _wait_for(child: int, kill_after: float | None) -> int:
    if kill_after is not None:
        deadline = time.monotonic() + kill_after
        while time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _obey(order: dict[str, Any]) -> None:
    """In the child, which never returns."""
    from nanochat_pl.cli.main import main
    from tests.helpers import crash_points

    code = 70
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for stream in (1, 2):
            os.dup2(log, stream)
        if order["watch"]:
            crash_points.install(**order["watch"])
        code = main(order["arguments"])
        if order["watch"]:
            crash_points.write_names()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
