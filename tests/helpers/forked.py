"""Python programs at the price of a fork: copies of a process that has imported everything, and run nothing of it.

    program = Forked(["-m", "nanochat_pl.cli.main", "train", …], stdout=file)      # as subprocess.Popen([python, …])

Starting an interpreter and importing torch takes six seconds, a copy of :mod:`tests.helpers.fork_server` has done both.
The processes of a test run (``-n``) share one server.
What the commands pipeline, sweep and search start is a copy, too.
What is different: the variables that a library reads when it is loaded are those of the test run, the shipped settings
have been read once, and the parent of a program is the server. What a program starts with torch's launcher (torchrun,
or trainer.devices), or by multiprocessing's "spawn", is a copy too.
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
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "NANOCHAT_PL_TEST_FORK_SERVER"  # where the server listens, for programs that start programs
MAX_ORDER = 2**17  # bytes
SAME_FOR_ALL = ("source_hash", "_git_state")  # of nanochat_pl.cli.run_record: asked git and 400 files each time
COMMAND = ("-m", "nanochat_pl.cli.main")
Stream = int | IO[Any] | None


class Forked:
    """A program, with what tests use of :class:`subprocess.Popen`. It has a session of its own.

    Args:
        arguments: of the interpreter: ``-m MODULE …``, ``-c CODE …`` or ``SCRIPT …``.
        stdin, stdout, stderr: files or descriptors; None: those of this process, and nothing as its input.
        capture: keep what it prints for :meth:`communicate`, without a pipe: nobody has to read it while it runs.
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
        capture: bool = False,
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
        if capture:
            stdout, stderr = self._printed = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        with Path(os.devnull).open("rb") as nothing:
            streams = (
                nothing if stdin is None else stdin,
                1 if stdout is None else stdout,
                2 if stderr is None else stderr,
            )
            files = [each if isinstance(each, int) else each.fileno() for each in streams]
            self.pid = int(_ask(order, [*files, *pass_fds]))

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = _ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its exit code."""
        if self.returncode is not None:
            return self.returncode
        with contextlib.suppress(ProcessLookupError):  # the server keeps the exit codes of those that have ended
            descriptor = os.pidfd_open(self.pid)
            try:
                if not select.select([descriptor], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            finally:
                os.close(descriptor)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it has printed to stdout and stderr."""
        self.wait(timeout)
        return self.printed()

    def printed(self) -> tuple[str, str]:
        """What it has printed until now."""
        sizes = [os.fstat(file.fileno()).st_size for file in self._printed]
        out, err = (os.pread(file.fileno(), size, 0) for file, size in zip(self._printed, sizes, strict=True))
        return out.decode("utf-8", "replace"), err.decode("utf-8", "replace")

    def send_signal(self, signum: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def kill(self) -> None:
        """Kill it, with the processes of its session."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


class _Child(Forked):
    """What :func:`nanochat_pl.cli._subprocess.run_child` starts with :class:`subprocess.Popen`, as a copy."""

    def __init__(
        self, command: Sequence[str], stdin: int, stdout: Stream, stderr: int | None, env: Mapping[str, str], **_: bool
    ) -> None:
        assert stdin == subprocess.PIPE, command
        its, ours = os.pipe()
        self.stdin = os.fdopen(ours, "wb")
        try:
            super().__init__(
                command[1:], stdin=its, stdout=stdout, stderr=stdout if stderr == subprocess.STDOUT else None, env=env
            )
        finally:
            os.close(its)

    def send_signal(self, signum: int) -> None:
        """Called from a signal handler too, while the server may be asked for something else."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        """Tell it to stop."""
        self.send_signal(signal.SIGTERM)


def run_children_as_copies() -> None:
    """From here on, the commands that a command of ours runs are copies, as those that tests start are."""
    from nanochat_pl.cli import _subprocess

    python = sys.executable

    def popen(command: Sequence[str], **how: Any) -> subprocess.Popen[bytes] | _Child:
        if command[0] != python:  # a test's own program in its place
            return subprocess.Popen(command, **how)
        return _Child(command, **how)

    names = ("PIPE", "STDOUT", "TimeoutExpired")
    _subprocess.subprocess = SimpleNamespace(Popen=popen, **{name: getattr(subprocess, name) for name in names})  # type: ignore[assignment]


def run_forked(arguments: Sequence[str], timeout: float = 240.0, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end: exit code, stdout and stderr."""
    program = Forked(arguments, capture=True, **how)
    try:
        code = program.wait(timeout)
    finally:
        program.kill()
    return subprocess.CompletedProcess(program.args, code, *program.printed())


def running() -> dict[int, dict[str, Any]]:
    """The programs that run, by their ids: their ``arguments``, and some of their variables (``env``)."""
    return {int(pid): of for pid, of in _ask({"running": True}).items()}


_server: subprocess.Popen[bytes] | None = None
_connection: socket.socket | None = None


def start_server() -> None:
    """Start the server, where there is none yet. It is needed seconds later: it imports meanwhile."""
    global _connection
    if _connection is not None:
        return
    if ADDRESS in os.environ:
        name = os.environ[ADDRESS]
    else:
        listener, name = _listen()
        _launch(listener, name)
    _connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _connection.connect(f"\0{name}")


def share_server() -> None:
    """One server for this process and all that it starts, which begins when one of them asks for it."""
    if ADDRESS in os.environ:
        return
    listener, os.environ[ADDRESS] = _listen()

    def launch_when_asked() -> None:
        select.select([listener], [], [])
        _launch(listener, os.environ[ADDRESS])

    threading.Thread(target=launch_when_asked, daemon=True).start()


def _listen() -> tuple[socket.socket, str]:
    name = os.urandom(16).hex()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"\0{name}")
    listener.listen(64)
    return listener, name


def _launch(listener: socket.socket, name: str) -> None:
    global _server
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with listener:
        _server = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fork_server", str(listener.fileno()), name],
            stdin=subprocess.PIPE,  # it ends when this does, and its programs with it
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            cwd=ROOT,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
    atexit.register(_end_server)


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
