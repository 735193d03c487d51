"""What a sandbox answers, and that it says which walls stand. Attacks are in test_sandbox_hostile.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.settings import build
from nanochat_pl.tools.jail import values
from nanochat_pl.tools.sandbox import Check, Sandbox, SandboxSettings
from tests.tools import ordinary_user

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


def test_time_is_bounded() -> None:
    quick = Sandbox(SandboxSettings(seconds=0.5))
    outcome = quick.check("while True:\n    pass\n", "f", TESTS)
    assert (outcome.passed, outcome.reason, outcome.message) == (False, "timeout", "not through after 0.5 seconds")


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
    with pytest.raises(values.Broken):
        values.receive(read_end)
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
    seen: list[int] = []
    outcomes = strict.check_all(jobs, workers=3, progress=seen.append)
    assert [outcome.passed for outcome in outcomes] == [factor == 3 for factor in range(6)]
    assert seen == [1, 2, 3, 4, 5, 6]


def test_strict_has_all_walls_and_nothing_to_remark(strict: Sandbox) -> None:
    assert strict.missing == () and strict.remark is None
    assert {"file wall", "network wall", "process wall", "user wall"} <= set(strict.walls)
    weak = Sandbox(SandboxSettings(mode="weak"))
    assert "process wall" in weak.missing and "limits" in weak.walls
    assert weak.remark is not None and weak.remark.startswith("sandbox=weak: no ")


# Runs a command where no namespaces can be made, as in most containers.
_NO_NAMESPACES = (
    'for name in user mnt pid net ipc uts; do echo 0 > /proc/sys/user/max_${name}_namespaces; done; exec "$@"'
)
_SAY = """
import sys
from nanochat_pl.common.errors import UserError
from nanochat_pl.tools.sandbox import Sandbox, SandboxSettings
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
        assert done.stdout.startswith("passed sandbox=weak: no user wall, ")
        return
    assert "sandbox=strict: there is no user wall: " in done.stdout
    assert "sandbox=strict: there is no network wall: " in done.stdout
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
    script = f"from nanochat_pl.tools.sandbox import *\nprint(1, flush=True)\nSandbox({settings}).run({program!r})\n"
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
from nanochat_pl.tools.sandbox import Sandbox, SandboxSettings
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
