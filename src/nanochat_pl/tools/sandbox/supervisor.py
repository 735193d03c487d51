"""The supervisor of a jail: starts the judge and the program, watches both, and says how it came out."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from nanochat_pl.tools.sandbox import isolation
from nanochat_pl.tools.sandbox import processes as actors

TICK = {True: 0.02, False: 0.1}  # seconds between two looks at what the processes use, strict and weak
ROOM = 256  # processes and threads that a user may start while a program runs
_O_PATH = getattr(os, "O_PATH", os.O_RDONLY)
_PAGE = os.sysconf("SC_PAGE_SIZE")
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def report(found: dict[str, object]) -> None:
    os.write(1, json.dumps(found).encode() + b"\n")


def supervise(config: dict) -> None:
    """Run one job, report, and end this process; in a jail all others with it."""
    try:
        if config["strict"]:  # elsewhere it has to end the others first
            isolation.end_with_parent()
        isolation.keep_orphans()
        report(Supervisor(config).run())
    except _OURS as problem:
        report(_told(problem))
    except SystemExit:  # nobody waits for it any more
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def fork() -> int:
    """A new process. Where the system has too many for the moment, wait; Failed if it stays so."""
    for pause in (0.05, 0.1, 0.2, 0.4, 0.8):
        with contextlib.suppress(OSError):
            return os.fork()
        time.sleep(pause)
    try:
        return os.fork()
    except OSError as error:
        raise Failed(str(error)) from error


class Failed(Exception):
    """The system does not give what we need. It says nothing about the program."""


_OURS = (isolation.LayerMissing, Failed)


def _told(problem: Exception) -> dict[str, object]:
    """What is reported in place of an outcome."""
    if isinstance(problem, Failed):
        return {"failed": str(problem)}
    return {"missing": [["", str(problem)]]}


class Usage(NamedTuple):
    """What a process uses: seconds of CPU time, with those of the children that it waited for; bytes of memory."""

    parent: int
    cpu: float
    threads: int
    resident: int


class Supervisor:
    """One job.

    Pipes: ``calls`` from the judge to the program, ``answers`` back, ``verdict`` from the judge, ``status`` from the
    warden, ``printed`` from the program.
    """

    def __init__(self, config: dict) -> None:
        self.config = config
        self.strict: bool = config["strict"]
        self.has_judge: bool = config["tests"] is not None
        self.libraries: list[int] = []

    def run(self) -> dict[str, object]:
        """``reason``, ``message``, ``seconds`` and ``output``."""
        config = self.config
        if self.strict:
            isolation.build_root(config["base"], config["prefix"], config["libraries"], config["file"])
        isolation.close_to_others()
        self.null = os.open("/dev/null", os.O_RDWR)
        self.pipes = {name: os.pipe() for name in ("calls", "answers", "verdict", "status", "printed")}
        start = time.monotonic()
        if self.has_judge and fork() == 0:
            self._judge()
        if self.strict:
            isolation.enter_process_namespace()
        warden = fork()
        if warden == 0:
            self._warden()
        self._keep(0, 1, 2, *(self.pipes[name][0] for name in ("verdict", "status", "printed")))
        if self.strict:
            isolation.become(None)
        try:
            found = self.watch(start)
        finally:
            if not self.strict:
                kill_descendants(warden)
        return {**found, "seconds": time.monotonic() - start}

    # The others' first steps

    def _judge(self) -> None:
        tests, verdict = self.config["tests"], self.pipes["verdict"][1]
        calls, answers = self.pipes["calls"][1], self.pipes["answers"][0]
        try:
            self._keep(tests, verdict, calls, answers, null=(0, 1, 2))
            self._shut_in(1)
            found = actors.judge(json.loads(_contents(tests)), calls, answers)
            os.write(verdict, json.dumps(found).encode())
        except _OURS as problem:
            os.write(verdict, json.dumps(_told(problem)).encode())
        finally:
            os._exit(0)

    def _warden(self) -> None:
        """Start the program; tell its wait status, and whether processes of its are left."""
        program, status = self.config["program"], self.pipes["status"][1]
        calls, answers, printed = self.pipes["calls"][0], self.pipes["answers"][1], self.pipes["printed"][1]
        try:
            self._keep(program, status, calls, answers, printed, null=(0,))
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            isolation.keep_orphans()
            os.setpgid(0, 0)
            self._shut_in(2)
            pid = fork()
            if pid == 0:
                self._program(program, calls, answers)
            self._keep(status)
            code, left = _wait_for(pid)
            os.write(status, json.dumps([code, left]).encode())
        except _OURS as problem:
            os.write(status, json.dumps(_told(problem)).encode())
        finally:
            os._exit(0)

    def _program(self, program: int, calls: int, answers: int) -> None:
        try:
            sys.argv[:] = sys.orig_argv[:] = ["program.py"]
            os.environ.update(HOME=self.config["folder"], TMPDIR=self.config["folder"], LANG="C.UTF-8")
            source = _contents(program)
            self._keep(0, 1, 2, *([calls, answers] if self.has_judge else []), *self.libraries)
            if self.has_judge:
                actors.answer_calls(source, self.config["entry_point"], calls, answers)
            actors.run_program(source)
        finally:
            os._exit(1)

    def _shut_in(self, number: int) -> None:
        """Isolate this process, as the judge (1) or the program (2)."""
        config = self.config
        with isolation.building("limits"):
            if self.strict:
                isolation.hide_processes()
            own_user = config["first"] is not None
            if not self.strict and own_user:
                self.libraries = _open_libraries()
            opened = [config["folder"], *(config["libraries"] if config["landlock"] else [])]
            folder, *folders = (os.open(path, _O_PATH) for path in opened)
            if number == 2:  # the judge opens nothing that the program has written
                os.fchdir(folder)
            isolation.become((isolation.INSIDE if self.strict else config["first"]) + number if own_user else None)
            isolation.limit(config["seconds"], config["memory"], config["file"], self._max_processes())
        if config["landlock"]:
            isolation.restrict_files(folders, [folder])
        for fd in (folder, *folders):
            os.close(fd)
        if config["filter"]:
            isolation.filter_system_calls(self.strict)

    def _max_processes(self) -> int:
        """Of one user: the warden counts as well; in a jail of one user also launcher, supervisor and judge.

        Where other things of that user's run, what they start meanwhile must not be the program's fault: there is room
        for it. The supervisor does the counting, and this bounds what is forked between two of its looks.
        """
        most = int(self.config["processes"])
        if self.config["first"] is not None:
            return most + 1
        return most + 4 if self.strict else most + ROOM + processes_of(os.getuid())

    def _keep(self, *wanted: int, null: tuple[int, ...] = ()) -> None:
        """Close all descriptors but these; ``null`` become /dev/null."""
        for fd in null:
            os.dup2(self.null, fd)
        last = -1
        for fd in sorted({*wanted, *null, 1 << 20}):
            if fd > last + 1:  # closerange takes an empty range for an endless one
                os.closerange(last + 1, fd)
            last = fd

    # Watching

    def watch(self, start: float) -> dict[str, object]:
        """How it comes out; ``start``: when it began, by the clock that ``time.monotonic`` reads."""
        self.texts = {self.pipes[name][0]: bytearray() for name in ("verdict", "status", "printed")}
        self.closed: set[int] = set()
        self.poll, next_look = select.poll(), start
        for fd in self.texts:
            self.poll.register(fd, select.POLLIN)
        self.poll.register(0, 0)  # it is closed when the sandbox's own process ends
        found: dict[str, object] | None = None
        while found is None:
            now, over = time.monotonic(), None
            if now >= next_look:
                next_look = now + TICK[self.strict]
                over = self._too_much(now - start)
            if over is None:
                self._listen(max(0.0, next_look - now))
                found = self._decide()
                continue
            while found is None and self._listen(0):  # what was there before it was too much
                found = self._decide()
            found = found or over
        printed = self.texts[self.pipes["printed"][0]][: self.config["output"]]
        return {**found, "output": printed.decode("utf-8", "replace")}

    def _listen(self, seconds: float) -> bool:
        """Read what arrives within this time. False if there was nothing."""
        ready = self.poll.poll(seconds * 1000)
        for fd, _event in ready:
            if fd == 0:
                raise SystemExit
            part = os.read(fd, 1 << 16)
            self.texts[fd] += part
            if not part:
                self.closed.add(fd)
                self.poll.unregister(fd)
        return bool(ready)

    def _decide(self) -> dict[str, object] | None:
        """How it came out, if that is known by now."""
        verdict_end, status_end, printed_end = (self.pipes[name][0] for name in ("verdict", "status", "printed"))
        if len(self.texts[printed_end]) > self.config["output"]:
            return _found("output", f"printed more than {self.config['output'] >> 10:,} KiB")
        verdict: dict[str, object] | None = None
        if self.has_judge and verdict_end in self.closed:
            verdict = json.loads(self.texts[verdict_end] or b'{"reason": "memory", "message": "the tests were killed"}')
            if verdict.get("reason") not in ("passed", "gone"):
                return verdict
        if status_end not in self.closed:
            return None
        if not self.texts[status_end]:
            return _found("escaped", "the program ended its warden")
        ended = json.loads(self.texts[status_end])
        if isinstance(ended, dict):
            return ended
        status, left = ended
        if left:
            return _found("escaped", "the program left processes behind")
        if self.has_judge and verdict is None:
            return None
        return _judged_by_end(status, verdict, bytes(self.texts[printed_end]))

    def _too_much(self, waited: float) -> dict[str, object] | None:
        table = usage()
        pids = [pid for pid in table if pid != os.getpid()] if self.strict else descendants(table)
        others = [table[pid] for pid in pids]
        if sum(other.resident for other in others) > self.config["memory"]:
            return _found("memory", f"its processes took more than {self.config['memory'] >> 20:,} MiB together")
        if sum(other.threads for other in others) > self.config["processes"] + 2:  # judge and warden
            return _found("processes", f"more than {self.config['processes']:,} processes and threads")
        if sum(other.cpu for other in others) > self.config["seconds"]:
            return _found("timeout", f"not through after {self.config['seconds']:g} seconds of CPU time")
        if waited > self.config["wall"]:
            return _found("timeout", f"not through after {self.config['wall']:g} seconds")
        return None


def _found(reason: str, message: str) -> dict[str, object]:
    return {"reason": reason, "message": message}


def _judged_by_end(status: int, verdict: dict[str, object] | None, printed: bytes) -> dict[str, object]:
    """From the program's wait status, and what the judge says."""
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGSYS:
        return _found("escaped", "the program made a system call that is forbidden")
    if verdict is not None and verdict["reason"] == "passed":
        return verdict
    if code == -signal.SIGXCPU:
        return _found("timeout", "the program used up its CPU time")
    last = printed.decode("utf-8", "replace").strip().rpartition("\n")[2][: actors.TEXT]
    if verdict is None and code == 0:
        return _found("passed", "ended with exit code 0")
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    if verdict is not None:
        return _found("error", f"the program {how} before its tests were through")
    return _found("memory" if last.startswith("MemoryError") else "error", f"{how}{': ' + last if last else ''}")


def _contents(fd: int) -> str:
    with open(fd, encoding="utf-8", errors="surrogatepass", newline="") as file:
        file.seek(0)
        return file.read()


def _open_libraries() -> list[int]:
    """Python's folders as descriptors, by which they are found from now on: they may lie in another user's home."""
    folders = [index for index, path in enumerate(sys.path) if Path(path).is_dir()]
    fds = [os.open(sys.path[index], _O_PATH) for index in folders]
    for index, fd in zip(folders, fds, strict=True):
        sys.path[index] = f"/proc/self/fd/{fd}"
    return fds


def _wait_for(pid: int) -> tuple[int, bool]:
    """The wait status of a child, and whether it left children that it had not waited for: they are this process's."""
    left = False
    ended, code = os.wait()
    while ended != pid:
        left = True
        ended, code = os.wait()
    with contextlib.suppress(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
        left = True
    return code, left


def usage() -> dict[int, Usage]:
    """Number of a process → what it uses, for all that can be seen.

    Parents come before their children: one that ends meanwhile is not counted as both itself and its parent's. It has
    to be quick: where a program forks without end, this gets a small share of the processors.
    """
    table = {}
    for pid in sorted(int(folder.name) for folder in Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(OSError):  # it has ended
            fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
            try:
                fields = os.read(fd, 4096).rpartition(b")")[2].split()
            finally:
                os.close(fd)
            parent, threads, pages = (int(fields[index]) for index in (1, 17, 21))
            table[pid] = Usage(parent, sum(map(int, fields[11:15])) / _CLOCK_TICKS, threads, pages * _PAGE)
    return table


def processes_of(uid: int) -> int:
    """How many processes and threads a user has now."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            count += sum(1 for _ in (folder / "task").iterdir()) if folder.stat().st_uid == uid else 0
    return count


def descendants(table: dict[int, Usage]) -> list[int]:
    """The processes that come from this one."""
    found, new = [], {os.getpid()}
    while new:
        new = {pid for pid, process in table.items() if process.parent in new}
        found += sorted(new)
    return found


def kill_descendants(group: int) -> None:
    """What the end of a process namespace does elsewhere. Orphans become children of this process: none is lost.

    Args:
        group: the process group, which the filter does not let the program leave. It is ended at one blow, so that no
            process gets away by forking faster than it can be found.
    """
    while True:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
        for pid in descendants(usage()):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)
