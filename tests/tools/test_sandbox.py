"""What a sandbox answers, and that it says which layers stand. Attacks are in test_sandbox_hostile.py."""

from __future__ import annotations

import copy
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build
from nanochat_pl.tools.sandbox import ipc
from nanochat_pl.tools.sandbox import sandbox as module
from nanochat_pl.tools.sandbox.sandbox import Sandbox
from nanochat_pl.tools.sandbox.settings import Check, SandboxSettings
from nanochat_pl.tools.sandbox.supervisor import Supervisor
from tests.helpers import ordinary_user

TESTS = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n"
SQUARE = "def f(x):\n    return x * x\n"


@pytest.fixture(scope="module", params=["strict", "weak"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return Sandbox(SandboxSettings(mode=request.param, seconds=60))


@pytest.fixture(scope="module")
def strict() -> Sandbox:
    return Sandbox(SandboxSettings(seconds=60))


@pytest.mark.parametrize(
    ("program", "reason", "message"),
    [
        (SQUARE, "passed", "passed"),
        ("def f(x):\n    return 2 * x\n", "failed", "the assertion in line 3 of the tests does not hold"),
        ("def f(x):\n    return x / 0\n", "error", "the program raised ZeroDivisionError: division by zero"),
        ("def f(x)\n", "error", "the program raised SyntaxError: expected ':' (program.py, line 1)"),
        ("def g(x):\n    return x\n", "error", "the program raised NameError: there is no f"),
        ("def f(x):\n    return object()\n", "error", "the program raised TypeError: object is no plain value"),
        ("import time\ndef f(x):\n    raise MemoryError\n", "memory", "the program raised MemoryError"),
        (
            "def f(x):\n    raise ValueError('\\x1b[31m' + 'a' * 999)\n",
            "error",
            "the program raised ValueError: \\x1b[31ma",
        ),
        (
            "import os\ndef f(x):\n    os._exit(3)\n",
            "error",
            "the program ended with exit code 3 before its tests were",
        ),
        ("import os\ndef f(x):\n    os.abort()\n", "error", "the program was killed by signal"),
    ],
)
def test_how_a_program_comes_out(sandbox: Sandbox, program: str, reason: str, message: str) -> None:
    outcome = sandbox.check(program, "f", TESTS)
    assert outcome.reason == reason
    assert outcome.message.startswith(message)
    assert outcome.passed == (reason == "passed")
    assert len(outcome.message) < 400
    assert 0 < outcome.seconds < 60


@pytest.mark.slow
def test_the_time_is_that_of_the_processors() -> None:
    """So that a verdict does not hang on how busy the machine is: waiting does not count, up to a bound."""
    waits = "import time\ntime.sleep(0.8)\ndef f(x):\n    return x * x\n"
    assert Sandbox(SandboxSettings(seconds=0.6)).check(waits, "f", TESTS).passed
    quick = Sandbox(SandboxSettings(seconds=0.2))
    outcome = quick.check("while True:\n    pass\n", "f", TESTS)
    assert (outcome.reason, outcome.message) == ("timeout", "not through after 0.2 seconds of CPU time")
    outcome = quick.check(waits.replace("0.8", "999"), "f", TESTS)
    assert (outcome.reason, outcome.message) == ("timeout", "not through after 2 seconds")


@pytest.mark.parametrize("mode", ["strict", pytest.param("weak", marks=pytest.mark.slow)])
@pytest.mark.parametrize("who", ["program", "tests"])
def test_the_time_of_all_processes_is_added_up(mode: Literal["strict", "weak"], who: str) -> None:
    """Four, one after the other, none of which reaches the limit of each; and the tests' own."""
    burn = """
import os, time
def burn(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
"""
    program = (
        burn
        + """
def f(x):
    for _ in range(4):
        if os.fork() == 0:
            burn(0.15)
            os._exit(0)
        os.wait()
    return x * x
"""
    )
    tests = TESTS
    if who == "tests":
        program, tests = SQUARE, burn + "def check(candidate):\n    burn(0.6)\n    assert candidate(2) == 4\n"
    sandbox = Sandbox(SandboxSettings(mode=mode, seconds=60))
    assert sandbox.check(program, "f", tests).passed
    sandbox = Sandbox(SandboxSettings(mode=mode, seconds=0.4))
    assert sandbox.check(program, "f", tests).message == "not through after 0.4 seconds of CPU time"


def test_what_has_arrived_is_read_before_the_time_is_over(tmp_path: Path) -> None:
    """A supervisor that gets no processor for long finds the time over and the verdict there."""
    late = Supervisor({"seconds": 1e-9, "wall": 1e-9, "strict": True, "tests": 1, "output": 9, "memory": 1 << 40,
                       "processes": 9999})  # fmt: skip
    late.pipes = {name: os.pipe() for name in ("verdict", "status", "printed")}
    for name, text in (("verdict", '{"reason": "passed", "message": "passed"}'), ("status", "[0, false]")):
        os.write(late.pipes[name][1], text.encode())
    for _, write_end in late.pipes.values():
        os.close(write_end)
    standing_by = os.dup(0)
    held = os.pipe()
    os.dup2(held[0], 0)
    try:
        assert late.watch(time.monotonic() - 1)["reason"] == "passed"
    finally:
        os.dup2(standing_by, 0)
        for fd in (standing_by, *held, *(read_end for read_end, _ in late.pipes.values())):
            os.close(fd)


def test_as_many_processes_as_are_allowed(sandbox: Sandbox) -> None:
    program = """
import threading, time
def f(x):
    threads = [threading.Thread(target=time.sleep, args=(0.5,)) for _ in range(COUNT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return x * x
"""
    outcome = sandbox.check(program.replace("COUNT", "15"), "f", TESTS)  # and the first one
    assert outcome.passed, outcome
    assert not sandbox.check(program.replace("COUNT", "40"), "f", TESTS).passed


def test_run_is_a_script_of_its_own(sandbox: Sandbox) -> None:
    outcome = sandbox.run(
        "import os, sys\nif __name__ == '__main__':\n    print(sorted(os.environ), sys.argv[1:], 'é')\n"
    )
    assert outcome.passed
    assert outcome.output == "['HOME', 'LANG', 'TMPDIR'] [] é\n"
    failed = sandbox.run("print('here')\n1 / 0\n")
    assert (failed.reason, failed.message) == ("error", "ended with exit code 1: ZeroDivisionError: division by zero")
    assert "launcher" not in failed.output and "here\n" in failed.output
    assert sandbox.run("raise SystemExit(7)").message == "ended with exit code 7"


def test_a_temporary_folder_and_the_standard_library_are_there(sandbox: Sandbox) -> None:
    program = (
        "import hashlib, math, random, tempfile, collections, decimal, threading\n"
        "open('file', 'w').write('text')\n"
        "with tempfile.TemporaryFile() as file:\n    file.write(b'x')\n"
        "threading.Thread(target=print, args=(open('file').read(),)).start()\n"
    )
    assert sandbox.run(program).output == "text\n"


def test_the_judge_has_the_names_of_the_prompt(strict: Sandbox) -> None:
    trusted = "import math\n\ndef helper(x):\n    return math.floor(x)\n\ndef f(x):\n    '''A stub.'''\n"
    tests = "def check(candidate):\n    assert helper(4.5) == candidate(2) == f(2)\n"
    assert strict.check(trusted + "    return x * x\n", "f", tests, trusted).passed
    assert not strict.check(trusted + "    return 5\n", "f", tests, trusted).passed


def test_plain_values_cross_exactly(strict: Sandbox) -> None:
    program = "from collections import Counter, namedtuple\ndef f(x):\n    return x\n\nclass L(list):\n    pass\n"
    tests = """
PLAIN = [None, True, 0, -(10**5000), 1.5, float('inf'), 2j, 'text \\ud800', b'bytes']
PLAIN += [(1, [2]), {(1,): {2}}, frozenset({3})]
def check(candidate):
    for value in PLAIN:
        back = candidate(value)
        assert back == value and type(back) is type(value)
    nan = candidate(float('nan'))
    assert nan != nan
    assert candidate(x=PLAIN) == PLAIN
"""
    outcome = strict.check(program, "f", tests)
    assert outcome.passed, outcome
    derived = program.replace("return x\n", "return [Counter('aa'), L([1]), namedtuple('T', 'a')(1)]\n")
    tests = "def check(f):\n    back = f(0)\n    assert list(map(type, back)) == [dict, list, tuple], back\n"
    assert strict.check(derived, "f", tests).passed


@pytest.mark.parametrize(
    "message",
    [
        b"[1]",
        b"7",
        b'{"int": 7}',
        b'{"int": "x"}',
        b'{"set": [{"list": []}]}',
        b'{"eval": "1"}',
        b'{"dict": [[1]]}',
        b"[",
    ],
)
def test_what_is_no_message_is_refused(message: bytes) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, len(message).to_bytes(4, "little") + message)
    os.close(write_end)
    with pytest.raises(ipc.Broken):
        ipc.receive(read_end)
    os.close(read_end)


def test_tests_that_catch_everything_are_not_passed_by_ending(strict: Sandbox) -> None:
    tests = "def check(candidate):\n    try:\n        candidate(1)\n    except BaseException:\n        pass\n"
    outcome = strict.check("import os\ndef f(x):\n    os._exit(0)\n", "f", tests)
    assert (outcome.passed, outcome.reason) == (False, "error")
    garbage = "import os\ndef f(x):\n    for fd in range(3, 64):\n        try:\n            os.write(fd, bytes(9))\n"
    garbage += "        except OSError:\n            pass\n    return 1\n"
    assert not strict.check(garbage, "f", tests).passed


def test_an_error_of_the_programs_is_one_of_the_tests(strict: Sandbox) -> None:
    tests = "def check(f):\n    try:\n        f(1)\n    except ValueError:\n        return\n    assert False\n"
    assert strict.check("def f(x):\n    raise ValueError('expected')\n", "f", tests).passed
    assert not strict.check("def f(x):\n    raise KeyError('other')\n", "f", tests).passed


@pytest.mark.parametrize("source", ["program", "tests", "trusted"])
def test_annotations_are_evaluated_as_python_does(strict: Sandbox, source: str) -> None:
    """Ours have a future import, which what they compile must not inherit."""
    code = {"program": SQUARE, "tests": TESTS, "trusted": ""}
    code[source] += "\ndef g(x: Missing) -> None:\n    pass\n"
    outcome = strict.check(code["program"], "f", code["tests"], code["trusted"])
    assert outcome.reason == "error" and "NameError: name 'Missing' is not defined" in outcome.message
    assert "NameError" in strict.run(code["program"]).message or source != "program"


def test_an_exception_arrives_as_the_builtin_one_that_it_is(strict: Sandbox) -> None:
    tests = "def check(f):\n    try:\n        f(1)\n    except {}:\n        return\n    assert False\n"
    own = "class Own(ValueError):\n    pass\n\ndef f(x):\n    {}\n"
    for line, kind in (
        ("raise Own('x')", "ValueError"),
        ("raise type('Own', (Exception,), {})", "Exception"),
        ("import json; json.loads('[')", "ValueError"),
        ("b'\\xff'.decode()", "UnicodeError"),  # UnicodeDecodeError itself wants five arguments
    ):
        assert strict.check(own.replace("{}", line, 1), "f", tests.format(kind)).passed, line
        outcome = strict.check(own.replace("{}", line, 1), "f", tests.format("(RuntimeError, KeyError)"))
        assert outcome.reason == "error" and outcome.message.startswith("the program raised "), outcome


def test_an_exception_does_not_end_a_loop_of_the_tests(strict: Sandbox) -> None:
    tests = "def check(f):\n    for answer in map(f, [1, 2]):\n        assert answer == 3\n"
    assert strict.check("def f(x):\n    raise StopIteration\n", "f", tests).reason == "error"
    assert strict.check("def f(x):\n    return 3\n", "f", tests).passed


def test_many_in_their_order(strict: Sandbox) -> None:
    jobs = [
        Check(f"def f(x):\n    return x * {factor}\n", "f", "def check(f):\n    assert f(1) == 3\n")
        for factor in range(6)
    ]
    outcomes = strict.check_all(jobs)
    assert [outcome.passed for outcome in outcomes] == [factor == 3 for factor in range(6)]


def test_processes_of_one_launch_share_the_processors(monkeypatch: pytest.MonkeyPatch, strict: Sandbox) -> None:
    asked = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers: int) -> None:
            asked.append(workers)
            super().__init__(workers)

    monkeypatch.setattr(module, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    strict.check_all([])
    for name, value in (("WORLD_SIZE", 6), ("RANK", 1), ("LOCAL_WORLD_SIZE", 3), ("LOCAL_RANK", 1)):
        monkeypatch.setenv(name, str(value))
    strict.check_all([])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    strict.check_all([])
    assert asked == [8, 2, 1]


def _launcher(folder: Path, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    """Let launchers do something else before they begin; ``count`` is how many there were."""
    script = folder / "launcher.py"
    script.write_text(
        f"import os, runpy, sys, time\nfolder = {str(folder)!r}\ncount = len(os.listdir(folder))\n"
        f"open(os.path.join(folder, str(count)), 'w').close()\n{before}\n"
        f"runpy.run_path({str(module._LAUNCHER)!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr(module, "_LAUNCHER", script)


def test_a_launcher_that_is_killed_costs_no_other_outcome(
    strict: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [Check(SQUARE, "f", TESTS)] * 3
    _launcher(tmp_path, monkeypatch, "if count in (1, 3, 4):\n    os.kill(os.getpid(), 9)\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    outcomes = strict.check_all(jobs)  # launchers 1 and 2, 3 and 4, 5
    assert [outcome.reason for outcome in outcomes] == ["passed", "error", "passed"]
    assert outcomes[1].message == "the sandbox gave no answer, twice: it was killed by signal 9"


def test_a_launcher_that_hangs_is_not_the_programs_timeout(
    strict: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _launcher(tmp_path, monkeypatch, "time.sleep(999)\n")
    monkeypatch.setattr(module, "GRACE", 0.2)
    outcome = Sandbox.check(_with(strict, seconds=0.01), SQUARE, "f", TESTS)
    assert outcome.reason == "error"
    assert outcome.message.startswith("the sandbox gave no answer, twice: not within 0.3 seconds")
    with pytest.raises(UserError, match="gave no answer, twice: not within"):
        Sandbox(SandboxSettings())


def _with(sandbox: Sandbox, **changes: Any) -> Sandbox:
    other = copy.copy(sandbox)
    other.settings = replace(sandbox.settings, **changes)
    return other


@pytest.mark.parametrize(
    ("place", "name", "problem", "fix"),
    [
        (tempfile, "tempdir", "/nowhere", "TMPDIR"),
        (sys, "executable", "/nowhere/python", "/nowhere/python"),
        (os, "pipe", OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n"),
        (subprocess, "Popen", OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "ulimit -u"),
        (tempfile, "TemporaryFile", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "TMPDIR"),
    ],
)
def test_what_the_system_does_not_give_is_said(
    strict: Sandbox, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, problem: Any, fix: str
) -> None:
    def fails(*arguments: object, **keywords: object) -> None:
        raise problem

    monkeypatch.setattr(place, name, fails if isinstance(problem, OSError) else problem)
    with pytest.raises(UserError) as error:
        strict.check(SQUARE, "f", TESTS)
    assert fix in str(error.value)


_AS_USER = """
import json, os, resource, subprocess, sys, threading, time
from nanochat_pl.common.errors import UserError
from nanochat_pl.tools.sandbox.sandbox import Sandbox
from nanochat_pl.tools.sandbox.settings import SandboxSettings
sandbox = Sandbox(SandboxSettings(mode="weak", seconds=60))
TESTS = "def check(f):\\n    assert f(2) == 4\\n"
SQUARE = "def f(x):\\n    return x * x\\n"
"""


@pytest.mark.slow
def test_what_the_user_starts_meanwhile_is_no_fault_of_the_program() -> None:
    script = """
program = "import time, threading\\ntime.sleep(3)\\nthreading.Thread(target=print).start()\\n" + SQUARE
found = []
checking = threading.Thread(target=lambda: found.append(sandbox.check(program, "f", TESTS)))
checking.start()
time.sleep(1.5)
others = [subprocess.Popen(["sleep", "600"]) for _ in range(60)]
checking.join()
for other in others:
    other.kill()
    other.wait()
print(found[0].reason)
"""
    assert ordinary_user.run("-c", _AS_USER + script) == "passed\n"


@pytest.mark.slow
def test_where_the_user_may_start_no_more_processes_it_is_said() -> None:
    """Of a check there are launcher, supervisor, judge, warden and program; this user has the asking one besides."""
    script = """
found = []
for most in range(6, 0, -1):
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    try:
        found.append(sandbox.check(SQUARE, "f", TESTS).reason)
    except UserError as error:
        found.append("ulimit -u" in error.fix or str(error))
print(json.dumps(found))
"""
    assert json.loads(ordinary_user.run("-c", _AS_USER + script)) == ["passed"] + [True] * 5


def test_strict_has_all_walls_and_nothing_to_remark(strict: Sandbox) -> None:
    assert strict.missing == () and strict.remark is None
    assert {"file isolation", "network isolation", "process isolation", "user isolation"} <= set(strict.layers)
    weak = Sandbox(SandboxSettings(mode="weak"))
    assert "process isolation" in weak.missing and "limits" in weak.layers
    assert weak.remark is not None and weak.remark.startswith("sandbox=weak: no ")


# Runs a command where no namespaces can be made, as in most containers.
_NO_NAMESPACES = (
    'for name in user mnt pid net ipc uts; do echo 0 > /proc/sys/user/max_${name}_namespaces; done; exec "$@"'
)
_SAY = """
import sys
from nanochat_pl.common.errors import UserError
from nanochat_pl.tools.sandbox.sandbox import Sandbox
from nanochat_pl.tools.sandbox.settings import SandboxSettings
try:
    sandbox = Sandbox(SandboxSettings(mode=sys.argv[1], seconds=60))
    print(sandbox.check("def f(x): return x", "f", "def check(f): assert f(1) == 1").reason, sandbox.remark)
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("mode", ["strict", "weak"])
def test_where_no_namespaces_can_be_made(mode: str) -> None:
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", _NO_NAMESPACES, "sh"]
    done = subprocess.run([*command, sys.executable, "-c", _SAY, mode], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs unshare: {done.stderr}")
    if mode == "weak":
        assert done.stdout.startswith("passed sandbox=weak: no user isolation, ")
        return
    assert "sandbox=strict: there is no user isolation: " in done.stdout
    assert "sandbox=strict: there is no network isolation: " in done.stdout
    assert "or take sandbox=weak" in done.stdout


def test_strict_within_a_user_namespace_of_one_id() -> None:
    command = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs unshare")
    done = subprocess.run([*command, sys.executable, "-c", _SAY, "strict"], capture_output=True, text=True)
    assert done.stdout == "passed None\n", done


@pytest.mark.parametrize("mode", ["strict", "weak"])
def test_nothing_outlives_the_process_that_asked(mode: str, tmp_path: Path) -> None:
    mark = f".{os.getpid():08d}1"
    settings = f"SandboxSettings(mode={mode!r}, seconds=600{mark})"
    program = "import os, time\nos.fork()\ntime.sleep(600)\n"
    imports = "from nanochat_pl.tools.sandbox.sandbox import *"
    script = f"{imports}\nprint(1, flush=True)\nSandbox({settings}).run({program!r})\n"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=_env(tmp_path)) as asking:
        assert _until(lambda: len(_processes(mark)) >= 6)  # itself, launcher, supervisor, warden, two of the program's
        asking.send_signal(signal.SIGKILL)
    assert _until(lambda: not _processes(mark)), _processes(mark)


def test_whatever_lies_in_the_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = """
import os
os.symlink("/", "everything")
os.mkfifo("pipe")
for name in (os.path.basename(os.getcwd()) + "-1", b"\\xff", "locked"):
    os.makedirs(os.path.join(os.fsencode(name), b"in", b"it"))
open("locked/file", "w").close()
for _ in range(1100):
    os.mkdir("deeper")
    os.chdir("deeper")
os.mkdir("shut", 0)
"""
    assert Sandbox(SandboxSettings(mode="weak", seconds=60)).run(program).passed
    assert list(tmp_path.iterdir()) == []


def test_rights_cannot_be_changed_in_weak_mode() -> None:
    program = """
import os
fd = os.open("file", os.O_RDWR | os.O_CREAT)
for change in (
    lambda: os.fchmod(fd, 0),
    lambda: os.fchown(fd, -1, -1),
    lambda: os.setxattr(fd, "user.x", b"x"),
    lambda: os.removexattr(fd, "user.x"),
):
    try:
        change()
        print("allowed")
    except OSError as error:
        print(type(error).__name__)
"""
    outcome = Sandbox(SandboxSettings(mode="weak", seconds=60)).run(program)
    assert outcome.output.split() == ["PermissionError"] * 4


def test_a_folder_without_rights_is_removed() -> None:
    script = """
import os
from nanochat_pl.tools.sandbox.sandbox import Sandbox
from nanochat_pl.tools.sandbox.settings import SandboxSettings
from nanochat_pl.tools.sandbox.sandbox import _folder
sandbox = Sandbox(SandboxSettings(mode="weak", seconds=60))
print(sandbox.run("import os\\nos.fchmod(os.open('.', os.O_RDONLY), 0)").reason)
with _folder() as folder:
    os.mkdir(folder + "/in")
    os.chmod(folder, 0)
"""
    # Not where tmp_path lies: a user may not enter that.
    with tempfile.TemporaryDirectory(prefix="sandbox-", dir="/var/tmp") as folder:
        Path(folder).chmod(0o777)
        assert ordinary_user.run("-c", script, TMPDIR=folder) == "error\n"
        assert list(Path(folder).iterdir()) == []


def _env(folder: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder)}


def _processes(mark: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if mark.encode() in command:
            found.append(process.name)
    return found


def _until(holds: Any) -> bool:
    for _ in range(600):
        if holds():
            return True
        time.sleep(0.1)
    return False


def test_settings_are_bounded() -> None:
    with pytest.raises(UserError) as error:
        build(SandboxSettings, {"mode": "none", "seconds": 0, "memory_mb": 1, "file_mb": 0}, "sandbox")
    assert len(error.value.problems) == 4
