"""Python programs at the price of a fork: copies of a process that has imported everything, and run nothing of it.

    program = Forked(["-m", "nanochat_pl.cli.main", "train", …], stdout=file)      # as subprocess.Popen([python, …])

Starting an interpreter and importing torch takes six seconds, a copy of :mod:`tests.helpers.fork_server` has done both.
What is different: the variables that a library reads when it is loaded are those of the test run, and the parent of a
program is the server. What a program starts with torch's launcher (as torchrun, or on several devices) is a copy too.
All that still runs is killed when the test run ends.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "NANOCHAT_PL_TEST_FORK_SERVER"  # where the server listens, for programs that start programs
MAX_ORDER = 2**17  # bytes
COMMAND = ("-m", "nanochat_pl.cli.main")
Stream = int | IO[Any] | None


class Forked:
    """A program, with what tests use of :class:`subprocess.Popen`. It has a session of its own.

    Args:
        arguments: of the interpreter: ``-m MODULE …``, ``-c CODE …`` or ``SCRIPT …``.
        stdin, stdout, stderr: files or descriptors; None: those of this process, and nothing as its input.
        env: all variables; None: those of this process.
        cwd: the folder in which it runs; None: that of this process.
        pass_fds: further descriptors, which it has under the same numbers.
        ignored: signals that it ignores, as under nohup; all others it heeds, Ctrl-C too.
        on_terminal: whether its input is the terminal that controls it.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        pass_fds: Sequence[int] = (),
        ignored: Sequence[int] = (),
        on_terminal: bool = False,
    ) -> None:
        self.args = [*arguments]
        self.returncode: int | None = None
        order = {
            "arguments": self.args,
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()),
            "numbers": [0, 1, 2, *pass_fds],
            "ignored": [*ignored],
            "on_terminal": on_terminal,
        }
        with open(os.devnull, "rb") as nothing:
            streams = [given if given is not None else usual for given, usual in ((stdin, nothing), (stdout, 1), (stderr, 2))]
            files = [each if isinstance(each, int) else each.fileno() for each in streams]
            self.pid = int(_ask(order, [*files, *pass_fds]))

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = _ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its exit code."""
        if self.poll() is None:
            descriptor = os.pidfd_open(self.pid)  # the server keeps its exit code until it is asked for it
            try:
                if not select.select([descriptor], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            finally:
                os.close(descriptor)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, signum: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """Kill it, with the processes of its session."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


def run_forked(arguments: Sequence[str], timeout: float = 240.0, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end: exit code, stdout and stderr."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        program = Forked(arguments, stdout=out, stderr=err, **how)
        try:
            code = program.wait(timeout)
        finally:
            program.kill()
        printed = [os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0) for file in (out, err)]
    return subprocess.CompletedProcess(program.args, code, *(each.decode("utf-8", "replace") for each in printed))


def running() -> dict[int, dict[str, Any]]:
    """The programs that run, by their ids: their ``arguments``, and some of their variables (``env``)."""
    return {int(pid): of for pid, of in _ask({"running": True}).items()}


_server: subprocess.Popen[bytes] | None = None
_connection: socket.socket | None = None


def start_server() -> None:
    """Start the server, where there is none yet. It is needed seconds later: it imports meanwhile."""
    global _connection, _server
    if _connection is not None:
        return
    name = os.environ.get(ADDRESS) or os.urandom(16).hex()
    if ADDRESS not in os.environ:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(f"\0{name}")
            listener.listen(64)
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            _server = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.fork_server", str(listener.fileno()), name],
                stdin=subprocess.PIPE,  # it ends when this does, and its programs with it
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                cwd=ROOT,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        atexit.register(_end_server)
    _connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _connection.connect(f"\0{name}")


def _end_server() -> None:
    global _connection, _server
    if _connection is not None:
        _connection.close()
    if _server is not None:
        assert _server.stdin is not None
        _server.stdin.close()
        _server.wait()
        atexit.unregister(_end_server)
    _connection = _server = None


def _ask(order: dict[str, Any], files: Sequence[int] = ()) -> Any:
    start_server()
    assert _connection is not None
    try:
        socket.send_fds(_connection, [json.dumps(order).encode()], files)
        answer = _connection.recv(MAX_ORDER)
    except BaseException:  # as a test's time limit: what comes late would be taken for the next answer
        _end_server()
        raise
    assert answer, "the fork server is gone"
    return json.loads(answer)
