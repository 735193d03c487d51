"""The side of a sandbox that is ours: starts a launcher for each program, and reads how it came out."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from nanochat_pl.common.errors import UserError, visible
from nanochat_pl.common.launch_env import launch_env, usable_cpus
from nanochat_pl.tools.sandbox import isolation
from nanochat_pl.tools.sandbox.settings import Check, Outcome, SandboxSettings

LAYERS = (*isolation.NAMESPACES, "bounded folder", "system call filter", "limits")
MESSAGE_CHARS = 300
# Wall-clock time of a program, in multiples of its CPU time: others run on the machine, and it may wait.
PATIENCE = 10
# Seconds that a launcher gets beyond the program's: on a busy machine, starting takes long.
GRACE = 60.0
_LAUNCHER = Path(isolation.__file__).with_name("launcher.py")
_SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
_FIX = (
    "strict needs Linux 5.14 or newer on x86_64 or aarch64 with user namespaces (sysctl user.max_user_namespaces, "
    "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in a container, one started "
    "with --security-opt seccomp=unconfined --security-opt systempaths=unconfined); "
    "or take sandbox=weak: fewer isolation layers, and the scores say so"
)


class Sandbox:
    """Runs foreign Python code, each program in processes of its own.

    Attributes:
        layers: the layers that stand.
        missing: those that do not: never any in strict mode.
        remark: what a score has to say with it; None in strict mode.

    Raises:
        UserError: mode strict, and an isolation layer cannot be had here: says which and why.
    """

    def __init__(self, settings: SandboxSettings) -> None:
        if sys.platform == "win32":
            raise UserError("sandbox: there is none on Windows", "run it on Linux; in WSL 2, for example")
        self.settings = settings
        probed = self._answer({"probe": True})
        if "missing" not in probed:
            raise UserError(f"sandbox: {probed['message']}", "try it again when the machine is less busy")
        problems = dict(probed["missing"])
        strict = settings.mode == "strict"
        self._filter = "system call filter" not in problems
        self._landlock = "Landlock" not in problems and not strict
        if strict:
            problems.pop("Landlock", None)  # not needed
            if problems:
                raise UserError([f"sandbox=strict: there is no {problem}" for problem in problems.values()], _FIX)
        stand = dict.fromkeys(LAYERS, strict) | {"limits": True}
        if not strict:  # what a user id of its own, Landlock and the filter do for them
            stand |= {"user isolation": isolation.first_free_id() is not None, "file isolation": self._landlock}
            stand |= dict.fromkeys(("network isolation", "IPC isolation", "system call filter"), self._filter)
        self.layers = tuple(layer for layer in LAYERS if stand[layer])
        self.missing = tuple(layer for layer in LAYERS if not stand[layer])
        self.remark = f"sandbox=weak: no {', no '.join(self.missing)}" if self.missing else None
        trial = self.check(
            "def double(x):\n    return 2 * x\n", "double", "def check(f):\n    assert f([1]) == [1, 1]\n"
        )
        if not trial.passed:
            raise UserError(f"sandbox={settings.mode}: a program that doubles a list fails here: {trial.message}", _FIX)

    def run(self, program: str) -> Outcome:
        """Run a program as a script. It passes if it ends with exit code 0, so it can claim that it does.

        Raises:
            UserError: an isolation layer of strict mode could not be built.
        """
        return self._outcome(program, None, None)

    def check(self, program: str, entry_point: str, tests: str, trusted: str = "") -> Outcome:
        """Whether the function ``entry_point`` of a program passes tests that it cannot see: see :class:`Check`.

        Arguments and results cross as plain values (numbers, text, bytes, lists, tuples, dicts, sets).

        Raises:
            UserError: an isolation layer of strict mode could not be built.
        """
        return self._outcome(program, entry_point, {"trusted": trusted, "tests": tests, "entry_point": entry_point})

    def check_all(self, jobs: Sequence[Check]) -> list[Outcome]:
        """:meth:`check` for many, as many at a time as there are processors for this process."""
        # Of this machine's processors a share, where a launcher started several processes.
        with ThreadPoolExecutor(max(1, usable_cpus() // launch_env().local_world_size)) as pool:
            return list(pool.map(lambda job: self.check(job.program, job.entry_point, job.tests, job.trusted), jobs))

    def _outcome(self, program: str, entry_point: str | None, judge: dict[str, str] | None) -> Outcome:
        with _system_errors_explained(), contextlib.ExitStack() as stack:
            files = [stack.enter_context(_nameless(program))]
            if judge is not None:
                files.append(stack.enter_context(_nameless(json.dumps(judge))))
            strict = self.settings.mode == "strict"
            folder = "/tmp" if strict else stack.enter_context(_folder())
            found = self._answer(
                {
                    "probe": False,
                    "strict": strict,
                    "filter": self._filter,
                    "landlock": self._landlock,
                    "base": "/tmp",  # a folder that everybody may enter
                    "folder": folder,
                    "prefix": sys.base_prefix,
                    "libraries": _libraries(),
                    "program": files[0].fileno(),
                    "tests": files[1].fileno() if judge is not None else None,
                    "entry_point": entry_point,
                    "seconds": self.settings.seconds,
                    "wall": PATIENCE * self.settings.seconds,
                    "memory": self.settings.memory_mb << 20,
                    "file": self.settings.file_mb << 20,
                    "processes": self.settings.max_processes,
                    "output": self.settings.output_kb << 10,
                },
                *(file.fileno() for file in files),
            )
        if "missing" in found:
            raise UserError(
                [f"sandbox={self.settings.mode}: there is no {layer}" for _, layer in found["missing"]], _FIX
            )
        message = visible(found["message"].replace("\n", " "))[:MESSAGE_CHARS]
        passed = found["reason"] == "passed"
        return Outcome(passed, found["reason"], message, float(found["seconds"]), visible(found["output"]))

    def _answer(self, config: dict[str, Any], *files: int) -> dict[str, Any]:
        """What a launcher says. Where it says nothing, another one is asked; then it is an error of this program."""
        for _ in range(2):
            found = self._launch(config, *files)
            if "problem" not in found and "failed" not in found:
                return found
        if "failed" in found:
            raise UserError(f"sandbox: no process can be started: {found['failed']}", _FIXES[errno.EAGAIN])
        message = f"the sandbox gave no answer, twice: {found['problem']}"
        return {"reason": "error", "message": message, "seconds": 0.0, "output": ""}

    def _launch(self, config: dict[str, Any], *files: int) -> dict[str, Any]:
        """Start the launcher, and read its line; ``problem`` if there is none. All that it started has ended then."""
        patience = config.get("wall", 0.0) + GRACE
        with _system_errors_explained():
            watched, held = os.pipe()  # the jail ends when the other end is closed: it does not outlive this process
            try:
                with subprocess.Popen(
                    [sys.executable, "-I", "-S", "-X", "utf8", str(_LAUNCHER), json.dumps(config)],
                    stdin=watched,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=_environment(),
                    pass_fds=files,
                    start_new_session=True,
                    cwd="/",
                ) as process:
                    try:
                        out, err = process.communicate(timeout=patience)
                    except subprocess.TimeoutExpired:
                        return {"problem": f"not within {patience:g} seconds"}
                    finally:
                        process.kill()
            finally:
                os.close(watched)
                os.close(held)
        try:
            return json.loads(out)
        except ValueError:
            said, code = err.decode(errors="replace").strip(), process.returncode
            ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return {"problem": said[-MESSAGE_CHARS:] or f"it {ended}"}


def _environment() -> dict[str, str]:
    """One pool of memory for all threads of a process: others would take 64 MiB of its address space each."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {**kept, "MALLOC_ARENA_MAX": "1"}


@contextlib.contextmanager
def _system_errors_explained() -> Iterator[None]:
    """What the system does not give us is no fault of a program's."""
    try:
        yield
    except OSError as error:
        fix = _FIXES.get(error.errno or 0, f"needed: a temporary folder to write to (TMPDIR), and {sys.executable}")
        raise UserError(f"sandbox: {error}", fix) from error


_FIXES = {
    errno.EAGAIN: "allow more processes (ulimit -u; in a container its limit of processes), or have fewer run at once",
    errno.EMFILE: "allow more open files: ulimit -n 4096",
    errno.ENFILE: "have fewer programs run on this machine: it has no descriptors left",
    errno.ENOSPC: "make room in the temporary folder, or name another one: TMPDIR",
}


def _nameless(text: str) -> IO[bytes]:
    """An open file without a name that holds a text."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
    file.write(text.encode("utf-8", "surrogatepass"))
    file.flush()
    return file


def _libraries() -> list[str]:
    """What a program may read: the system's libraries, and Python's."""
    base, found = Path(sys.base_prefix), [path for path in _SYSTEM_LIBRARIES if Path(path).exists()]
    for name in ("stdlib", "platstdlib"):
        path = Path(sysconfig.get_path(name, vars={"base": str(base), "platbase": sys.base_exec_prefix}))
        if path.is_relative_to(base):
            path = base / path.relative_to(base).parts[0]  # lib
        if not any(path.is_relative_to(known) for known in found):
            found.append(str(path))
    return found


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A temporary folder. Of what is put into it, nothing is left."""
    folder = Path(tempfile.mkdtemp(prefix="nanochat-sandbox-"))
    try:
        yield str(folder)
    finally:
        try:
            _remove(folder)
        except OSError as error:  # no reason to lose an outcome
            warnings.warn(f"sandbox: a temporary folder is left behind: {error}", stacklevel=2)


def _remove(folder: Path) -> None:
    """Remove a folder in which somebody may have done anything: nested it deeply, or taken rights away."""
    folder.chmod(0o700)
    while entries := list(folder.iterdir()):
        for entry in entries:
            if entry.is_symlink() or not entry.is_dir():
                entry.unlink()
                continue
            entry.chmod(0o700)
            for below in list(entry.iterdir()):
                if below.is_symlink() or not below.is_dir():
                    below.unlink()
                else:  # moved up, so that no path gets long
                    below.chmod(0o700)
                    below.rename(folder / secrets.token_hex(16))
            entry.rmdir()
    folder.rmdir()
