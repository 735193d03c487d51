"""Programs that attack a sandbox.

Each defines ``f``, whose tests ask for ``f(3) == 9``. An attack that is tried and refused gives 0, one that gets
through gives 9: so a program passes only where its attack does. CANARY is a folder with ``secret.txt``, which holds
SECRET; PORT a listener on this machine, SOCKET one in the file system and DATAGRAMS one there that takes messages of
anybody; VICTIM the number of a process of the same
user that has SECRET in its environment.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace

from nanochat_pl.tools.sandbox.sandbox import Sandbox
from nanochat_pl.tools.sandbox.settings import Outcome, SandboxSettings

TESTS = "KEY = 'key of the tests'\n\ndef check(candidate):\n    assert candidate(3) == 9\n"
# Tries an attack within f: 9 where it gets through.
_TRY = """
def f(x):
    try:
        return 9 if attack() else 0
    except Exception:
        return 0
"""
_LIBC = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
"""


@dataclass(frozen=True)
class Hostile:
    name: str
    program: str
    reasons: frozenset[str]

    @property
    def seconds(self) -> float:
        """CPU time that it gets: little, where its end is that of its time. It may wait ten times as long."""
        return 0.3 if "timeout" in self.reasons else 20.0

    def run(self, sandbox: Sandbox, names: Mapping[str, object], more: float) -> Outcome:
        """Its outcome, with names such as CANARY replaced; ``more``: seconds to be added."""
        program = self.program
        for name, value in names.items():
            program = program.replace(name, str(value))
        sandbox.settings = replace(sandbox.settings, seconds=self.seconds + more)
        return sandbox.check(program, "f", TESTS)


def _attack(name: str, body: str, *reasons: str, before: str = "") -> Hostile:
    """One whose f tries ``body`` as ``attack``."""
    text = before + "\ndef attack():\n" + textwrap.indent(textwrap.dedent(body).strip(), "    ") + "\n" + _TRY
    return Hostile(name, text, frozenset(reasons or ["failed"]))


def _whole(name: str, program: str, *reasons: str) -> Hostile:
    return Hostile(name, textwrap.dedent(program), frozenset(reasons))


HOSTILE = (
    # Using up the machine
    _whole(
        "fork bomb",
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n",
        "timeout",
        "processes",
        "memory",
    ),
    _whole(
        "thread bomb",
        """
        import threading, time
        while True:
            try:
                threading.Thread(target=time.sleep, args=(99,)).start()
            except RuntimeError:
                pass
        """,
        "timeout",
        "memory",
        "processes",
    ),
    _whole("memory", "hoard = []\nwhile True:\n    hoard.append(bytearray(1 << 20))\n", "memory", "error"),
    _whole(
        "memory in many processes",
        """
        import os, time
        for _ in range(6):
            if os.fork() == 0:
                break
        hoard = [bytearray(b"x") * (40 << 20) for _ in range(3)]
        time.sleep(99)
        """,
        "memory",
    ),
    _whole(
        "endless loop that ignores signals",
        """
        import signal
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        while True:
            pass
        """,
        "timeout",
    ),
    _whole("stops itself", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\n", "timeout", "error"),
    _whole("output flood", "while True:\n    print('x' * 1000)\n", "output"),
    _whole(
        "deep recursion",
        "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __repr__(self):\n        return repr(self)\n"
        "def f(x):\n    return repr(A())\n",
        "error",
        "memory",
    ),
    _attack(
        "files until the disk is full",
        """
        written = 0
        for number in range(200):
            with open(f"/tmp/{number}", "wb") as file:
                written += file.write(bytes(1 << 20))
        return written > 100 << 20
        """,
    ),
    # Files
    _attack(
        "deletion in home",
        """
        import os, shutil
        shutil.rmtree("CANARY")
        return not os.path.exists("CANARY")
        """,
    ),
    _attack("reading a secret", "return 'SECRET' in open('CANARY/secret.txt').read()"),
    _attack(
        "writing through a link",
        """
        import os
        os.symlink("CANARY/secret.txt", "link")
        with open("link", "w") as file:
            file.write("overwritten")
        return True
        """,
    ),
    _attack(
        "climbing out by open descriptors and the root",
        """
        import os
        for start in ("/", ".", *map(str, range(64))):
            try:
                fd = int(start) if start.isdigit() else os.open(start, os.O_RDONLY)
                for _ in range(40):
                    fd = os.open("..", os.O_RDONLY, dir_fd=fd)
                with open(os.open("CANARY/secret.txt".lstrip("/"), os.O_RDONLY, dir_fd=fd)) as file:
                    return "SECRET" in file.read()
            except OSError:
                continue
        """,
    ),
    _attack(
        "taking rights away",
        """
        import os
        for change in (lambda: os.chmod("CANARY/secret.txt", 0), lambda: os.utime("CANARY/secret.txt", (0, 0))):
            try:
                change()
                return True
            except OSError:
                continue
        """,
    ),
    # Other processes
    _attack(
        "environments of others",
        """
        import os
        for pid in ["self", str(os.getppid()), "VICTIM", *filter(str.isdigit, os.listdir("/proc"))]:
            try:
                if b"SECRET" in open(f"/proc/{pid}/environ", "rb").read():
                    return True
            except OSError:
                continue
        return "SECRET" in str(os.environ)
        """,
    ),
    _attack(
        "memory of others by the system",
        """
        here = ctypes.create_string_buffer(8)
        one = (ctypes.c_ulong * 2)(ctypes.addressof(here), 8)
        for pid in (os.getppid(), VICTIM):
            if libc.process_vm_readv(pid, one, 1, one, 1, 0) > 0 or libc.ptrace(16, pid, 0, 0) == 0:
                return True
        """,
        "escaped",
        before=_LIBC,
    ),
    _attack(
        "memory of others by files",
        """
        import os
        for pid in (os.getppid(), 1, VICTIM, os.getpid() - 1, os.getpid() - 2):
            try:
                with open(f"/proc/{pid}/mem", "rb"):
                    return True
            except OSError:
                continue
        """,
    ),
    _attack(
        "killing everybody",
        """
        import os, signal
        for pid in (VICTIM, os.getppid(), *range(max(2, os.getpid() - 6), os.getpid())):
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        os.kill(-1, signal.SIGKILL)
        """,
        "failed",
        "escaped",
    ),
    _attack(
        "a signal sent by the kernel",
        """
        import fcntl, os
        reader, writer = os.pipe()
        for owner in (VICTIM, os.getppid()):
            try:
                fcntl.fcntl(reader, fcntl.F_SETOWN, owner)
                fcntl.fcntl(reader, 10, 9)
                fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC)
                os.write(writer, b"x")
                return True
            except OSError:
                continue
        """,
    ),
    _attack(
        "system calls of another kind",
        """
        import mmap, platform
        if platform.machine() != "x86_64":
            os.abort()
        code = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
        code.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))  # getpid as 32-bit programs call it
        start = ctypes.addressof(ctypes.c_char.from_buffer(code))
        return ctypes.CFUNCTYPE(ctypes.c_int)(start)() > 0
        """,
        "escaped",
        "error",
        before=_LIBC,
    ),
    _attack("system calls with another number", "return libc.syscall(0x40000000 | 39) > 0", "escaped", before=_LIBC),
    _attack("leaving dumps", "return libc.prctl(4, 1, 0, 0, 0) == 0", before=_LIBC),
    _attack(
        "slowing others down",
        """
        import os
        os.setpriority(os.PRIO_PROCESS, VICTIM, 19)
        return True
        """,
    ),
    _whole(
        "a process that stays behind",
        """
        import os, time
        def f(x):
            return x * x
        if os.fork() == 0:
            try:
                os.setsid()
            except OSError:
                pass
            if os.fork() == 0:
                time.sleep(1)
                open("CANARY/late.txt", "w").write("here")
                time.sleep(99)
            os._exit(0)
        """,
        "escaped",
    ),
    # The network
    _attack(
        "connecting",
        """
        import socket
        with socket.create_connection(("127.0.0.1", PORT), timeout=2) as connection:
            connection.sendall(b"SECRET")
        return True
        """,
    ),
    _attack(
        "connecting by a file",
        """
        import socket
        for address in ("SOCKET", chr(0) + "SOCKET"):
            try:
                socket.socket(socket.AF_UNIX).connect(address)
                return True
            except OSError:
                continue
        """,
    ),
    _attack(
        "messages without connecting",
        """
        import socket
        for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC):
            try:
                return socket.socketpair(socket.AF_UNIX, kind)[0].sendto(b"SECRET", "DATAGRAMS") > 0
            except OSError:
                continue
        """,
    ),
    # The verdict
    _whole("ending before the check", "import os\ndef f(x):\n    os._exit(0)\n", "error"),
    _whole("ending while it is loaded", "import sys\nsys.exit(0)\n", "error"),
    _whole(
        "another assertion",
        """
        import builtins, sys
        class AssertionError(Exception):
            def __new__(cls, *arguments):
                sys.exit(0)
        builtins.AssertionError = AssertionError
        builtins.compile = builtins.exec = builtins.getattr = lambda *arguments: None
        def f(x):
            return None
        """,
        "failed",
        "error",
    ),
    _whole(
        "equal to everything",
        """
        class Nine(int):
            def __eq__(self, other):
                return True
            def __hash__(self):
                return hash(9)
            def __reduce__(self):
                return (eval, ("9",))
        def f(x):
            return Nine(5)
        """,
        "failed",
    ),
    _whole(
        "looking for the tests",
        """
        import ctypes, gc, sys
        def f(x):
            seen, frame = [], sys._getframe()
            while frame is not None:
                seen += [*frame.f_locals.values(), *frame.f_globals.values()]
                frame = frame.f_back
            text = repr(seen) + repr(gc.get_objects())
            return 9 if "".join(reversed("stset eht fo yek")) in text else 0
        """,
        "failed",
        "error",
    ),
    _whole(
        "a verdict of its own",
        """
        import json, os
        for fd in range(1, 64):
            for text in (json.dumps({"reason": "passed", "message": "passed"}), json.dumps([0, False])):
                try:
                    os.write(fd, text.encode() + bytes([10]))
                except OSError:
                    pass
        os._exit(0)
        """,
        "error",
    ),
    _whole(
        "raw bytes for the judge",
        """
        import os
        def f(x):
            deep = b"[" * 200000
            for fd in range(3, 64):
                try:
                    os.write(fd, len(deep).to_bytes(4, "little") + deep)
                except OSError:
                    pass
            os._exit(0)
        """,
        "error",
    ),
    _whole(
        "answers to questions that nobody has asked yet",
        """
        import json, os
        for fd in range(3, 64):
            for text in ('{"dict":[["value","loaded"]]}', '{"dict":[["reason","passed"]]}', '{"passed":[]}'):
                try:
                    os.write(fd, len(text).to_bytes(4, "little") + text.encode())
                except OSError:
                    pass
        def f(x):
            return 8
        """,
        "failed",
        "error",
    ),
    _whole(
        "files laid out for the judge",
        """
        import os
        for name in ("tests.py", "trusted.py", "program.py", "random.py", "usercustomize.py"):
            os.mkfifo(name)
        def f(x):
            return 8
        """,
        "failed",
    ),
    _whole(
        "a process that is never the same",
        """
        import os
        while True:
            if os.fork():
                os._exit(0)
        """,
        "timeout",
        "escaped",
        "error",  # the processes of the user's that there may be were used up by others: fork is refused
    ),
    _whole(
        "numbers that all have one hash",
        """
        def f(x):
            return {i * (2**61 - 1): 0 for i in range(1, 3)} and dict.fromkeys(
                (i * (2**61 - 1) for i in range(20000)), 0
            )
        """,
        "timeout",
        "failed",
    ),
    _whole(
        "an impostor answers",
        """
        import os
        def f(x):
            if os.fork() == 0:
                return 9
            os._exit(0)
        """,
        "escaped",
    ),
    _whole("too large an answer", "def f(x):\n    return [[[]] * 1000] * 100000\n", "timeout", "error", "memory"),
    # The isolation itself
    _attack("namespaces of its own", "return libc.unshare(0x10000000) == 0", "escaped", before=_LIBC),
    _attack(
        "namespaces by clone",
        "return libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) >= 0",
        "escaped",
        before=_LIBC,
    ),
    _attack("mounting", "return libc.mount(b'proc', b'/tmp', b'proc', 0, None) == 0", "escaped", before=_LIBC),
    _attack("another root", "os.chroot('/tmp')\nreturn True", "escaped", before=_LIBC),
    _attack(
        "another program",
        """
        import os, sys
        for path in ("/bin/sh", "/usr/bin/env", "/lib64/ld-linux-x86-64.so.2", sys.executable):
            try:
                if os.fork() == 0:
                    os.execv(path, [path, "--help"])
                if os.waitstatus_to_exitcode(os.wait()[1]) == 0:
                    return True
            except OSError:
                os._exit(1)
        """,
    ),
    _attack(
        "more rights",
        """
        import os
        for change in (lambda: os.setuid(0), lambda: os.setgroups([0]), lambda: os.setresuid(-1, 0, -1)):
            try:
                change()
                return True
            except OSError:
                continue
        """,
    ),
    _attack(
        "higher limits",
        """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        return True
        """,
    ),
    _attack("keys of the user", "return libc.syscall(250, 0, -3, 0, 0, 0) >= 0", "escaped", before=_LIBC),
    _attack(
        "memory that no process holds",
        """
        import mmap, os
        for claim in (lambda: mmap.mmap(-1, 64 << 20), lambda: os.memfd_create("x")):
            try:
                claim()
                return True
            except OSError:
                continue
        return libc.shmget(1, 64 << 20, 0o1666) >= 0
        """,
        before=_LIBC,
    ),
    _attack(
        "watches that are charged to the user",
        """
        import platform
        old = platform.machine() == "x86_64" and libc.syscall(253) >= 0
        return old or libc.inotify_init1(0) >= 0
        """,
        before=_LIBC,
    ),
)


def main() -> None:
    """All of them, as the user who runs this: prints of each its name, whether it was contained, and the outcome."""
    mode, names, more = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3])
    sandbox = Sandbox(SandboxSettings(mode=mode, memory_mb=256))
    for hostile in HOSTILE:
        outcome = hostile.run(sandbox, names, more)
        contained = not outcome.passed and outcome.reason in hostile.reasons
        print(json.dumps([hostile.name, contained, str(outcome)]), flush=True)


if __name__ == "__main__":
    main()
