"""The server of :mod:`tests.helpers.forked`: ``python -m tests.helpers.fork_server DESCRIPTOR NAME``.

It reads orders from each that connects to its socket, and forks. It has one thread, and ends with its standard input.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import locale
import multiprocessing.util
import os
import runpy
import select
import signal
import socket
import sys
import termios
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

from tests.helpers.forked import ADDRESS, MAX_ORDER, SAME_FOR_ALL, Forked, run_children_as_copies

MODULES = (
    "nanochat_pl.cli._warnings",
    "nanochat_pl.cli.launch",
    "nanochat_pl.cli.train",
    "nanochat_pl.cli._ledger",
    "nanochat_pl.training.run",
    "nanochat_pl.distributed.coordination",
    "torch.distributed.run",
    "tests.helpers.crash_points",
)
SHOWN = ("RANK", "NANOCHAT_PL_TEST_LAUNCH")  # variables of a program that others ask for


class Server:
    """Forks, and keeps the exit codes."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.connections: list[socket.socket] = []
        self.running: dict[int, dict[str, Any]] = {}
        self.codes: dict[int, int] = {}

    def serve(self) -> None:
        """Until the standard input ends."""
        while 0 not in (ready := select.select([0, self.listener, *self.connections], [], [])[0]):
            for each in ready:
                if each is self.listener:
                    self.connections.append(self.listener.accept()[0])
                else:
                    self._answer(each)
        for pid in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def _answer(self, connection: socket.socket) -> None:
        try:
            message, files, _, _ = socket.recv_fds(connection, MAX_ORDER, 16)
        except ConnectionResetError:
            message, files = b"", []
        if not message:
            self.connections.remove(connection)
            connection.close()
            return
        order = json.loads(message)
        answer: Any = self.running
        if "arguments" in order:
            answer = self._fork(order, files)
        self._reap()
        if "poll" in order:
            answer = self.codes.get(order["poll"])
        with contextlib.suppress(BrokenPipeError):
            connection.send(json.dumps(answer).encode())

    def _fork(self, order: dict[str, Any], files: list[int]) -> int:
        pid = os.fork()
        if pid == 0:
            for each in (self.listener, *self.connections):
                each.close()
            _run(order, files)
        for file in files:
            os.close(file)
        self.codes.pop(pid, None)
        shown = {name: order["env"][name] for name in SHOWN if name in order["env"]}
        self.running[pid] = {"arguments": order["arguments"], "env": shown}
        return pid

    def _reap(self) -> None:
        for pid in [*self.running]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
                del self.running[pid]


def _run(order: dict[str, Any], files: list[int]) -> NoReturn:
    """In the copy: become the program, and end as an interpreter does."""
    code = 70
    try:
        _prepare(order, files)
        code = _exit_code(order["arguments"])
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        try:
            sys.stdout.flush()
        except OSError:
            code = 120
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _prepare(order: dict[str, Any], files: list[int]) -> None:
    os.setsid()
    files = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 1000) for file in files]  # out of the way of the numbers
    for file, number in zip(files, order["numbers"], strict=True):
        os.dup2(file, number)
        os.close(file)
    if order["on_terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signum in order["ignored"]:
        signal.signal(signum, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(order["env"] | {ADDRESS: os.environ.get(ADDRESS, _address)})
    os.chdir(order["cwd"])
    encoding = locale.getencoding()
    sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115 (of a terminal, line by line)
    sys.stderr = open(2, "w", 1, encoding, "backslashreplace", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def _exit_code(arguments: list[str]) -> int:
    """Run the program, as its main module."""
    if arguments[0] == "-u":
        arguments = arguments[1:]
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    try:
        if arguments[0] == "-m":
            sys.argv, sys.path[0] = arguments[1:], str(Path.cwd())
            sys.modules.pop(arguments[1], None)
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _spawn(path: bytes, arguments: list[bytes | str], kept: tuple[int, ...]) -> int:
    """In place of a fresh interpreter that multiprocessing starts: a copy of the process that starts it."""
    code = os.fsdecode(arguments[-2])
    if "spawn_main" not in code:  # the resource tracker imports little
        return _spawn_interpreter(path, arguments, kept)
    if pid := os.fork():
        return pid
    try:
        gc.freeze()  # what the program has is never let go of: its descriptors are others' from here on
        signal.set_wakeup_fd(-1)
        for signum, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            signal.signal(signum, action)
        first = 3
        for descriptor in sorted(kept):
            os.closerange(first, descriptor)
            first = descriptor + 1
        os.closerange(first, os.sysconf("SC_OPEN_MAX"))
        status = _exit_code(["-c", code, *map(os.fsdecode, arguments[-1:])])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    finally:
        os._exit(70)


_spawn_interpreter = multiprocessing.util.spawnv_passfds
_address = ""


def _warm_up() -> None:
    """Have at hand what each command would find out anew: the first reading of settings takes as long as a training
    of five steps (Hydra's parser, the checks of each class), and the source is the same for all."""
    from nanochat_pl.cli import run_record
    from nanochat_pl.cli.train import TrainConfig
    from nanochat_pl.config.experiment import compose_step

    local = ["data=local", "data.path=texts", "logger=[]"]
    for typed in ([], local, ["stage=base", *local], ["stage=sft", "logger=[]"]):
        compose_step("train", "sft" if "stage=sft" in typed else "base", TrainConfig, typed)
    compose_step("train", "sft", TrainConfig, [])
    for name in SAME_FOR_ALL:
        found = getattr(run_record, name)()
        setattr(run_record, name, lambda found=found: found)


def main() -> None:
    """Import, and serve."""
    global _address
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    def popen(handler: Any, command: tuple[str, ...], env: dict[str, str]) -> Forked:
        assert command[0] == sys.executable, command
        return Forked(command[1:], env=env, stdout=handler._stdout, stderr=handler._stderr)

    _address = sys.argv[2]
    for name in MODULES:
        importlib.import_module(name)
    subprocess_handler.SubprocessHandler._popen = popen  # type: ignore[assignment, method-assign]
    multiprocessing.util.spawnv_passfds = _spawn  # type: ignore[attr-defined]
    run_children_as_copies()
    _warm_up()
    assert threading.active_count() == 1, "a copy would have locks that nobody lets go of"
    gc.freeze()  # a copy that collects garbage would copy all of it
    os.fsync = lambda file: None  # type: ignore[assignment]  # waiting for disks takes long, and no power cut is tested
    Server(socket.socket(fileno=int(sys.argv[1]))).serve()


if __name__ == "__main__":
    main()
