"""The side of a sandbox that is ours: starts a launcher for each program, and reads how it came out."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from nanochat_pl.common.errors import UserError, visible
from nanochat_pl.tools.jail import walls
from nanochat_pl.tools.sandbox.settings import Check, Outcome, SandboxSettings

WALLS = (*walls.NAMESPACES, "bounded folder", "system call filter", "limits")
MESSAGE_CHARS = 300
# Seconds that a launcher gets beyond the program's: on a busy machine, starting takes long.
GRACE = 60.0
_LAUNCHER = Path(walls.__file__).with_name("launcher.py")
_SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
_FIX = (
    "strict needs Linux 5.14 or newer on x86_64 or aarch64 with user namespaces (sysctl user.max_user_namespaces, "
    "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in a container, one started "
    "with --security-opt seccomp=unconfined --security-opt systempaths=unconfined); "
    "or take sandbox=weak: fewer walls, and the scores say so"
)


class Sandbox:
    """Runs foreign Python code, each program in processes of its own.

    Attributes:
        walls: the walls that stand.
        missing: those that do not: never any in strict mode.
        remark: what a score has to say with it; None in strict mode.

    Raises:
        UserError: mode strict, and a wall cannot be had here: says which and why.
    """

    def __init__(self, settings: SandboxSettings) -> None:
        if sys.platform == "win32":
            raise UserError("sandbox: there is none on Windows", "run it on Linux; in WSL 2, for example")
        self.settings = settings
        problems = dict(self._launch({"probe": True})["missing"])
        strict = settings.mode == "strict"
        self._filter = "system call filter" not in problems
        self._landlock = "Landlock" not in problems and not strict
        if strict:
            problems.pop("Landlock", None)  # not needed
            if problems:
                raise UserError([f"sandbox=strict: there is no {problem}" for problem in problems.values()], _FIX)
        stand = dict.fromkeys(WALLS, strict) | {"limits": True}
        if not strict:  # what a user id of its own, Landlock and the filter do for them
            stand |= {"user wall": walls.first_free_id() is not None, "file wall": self._landlock}
            stand |= dict.fromkeys(("network wall", "IPC wall", "system call filter"), self._filter)
        self.walls = tuple(wall for wall in WALLS if stand[wall])
        self.missing = tuple(wall for wall in WALLS if not stand[wall])
        self.remark = f"sandbox=weak: no {', no '.join(self.missing)}" if self.missing else None
        trial = self.check(
            "def double(x):\n    return 2 * x\n", "double", "def check(f):\n    assert f([1]) == [1, 1]\n"
        )
        if not trial.passed:
            raise UserError(f"sandbox={settings.mode}: a program that doubles a list fails here: {trial.message}", _FIX)

    def run(self, program: str) -> Outcome:
        """Run a program as a script. It passes if it ends with exit code 0, so it can claim that it does.

        Raises:
            UserError: a wall of strict mode could not be built.
        """
        return self._outcome(program, None, None)

    def check(self, program: str, entry_point: str, tests: str, trusted: str = "") -> Outcome:
        """Whether the function ``entry_point`` of a program passes tests that it cannot see: see :class:`Check`.

        Arguments and results cross as plain values (numbers, text, bytes, lists, tuples, dicts, sets).

        Raises:
            UserError: a wall of strict mode could not be built.
        """
        return self._outcome(program, entry_point, {"trusted": trusted, "tests": tests, "entry_point": entry_point})

    def check_all(
        self, jobs: Sequence[Check], workers: int | None = None, progress: Callable[[int], None] | None = None
    ) -> list[Outcome]:
        """:meth:`check` for many, several at a time.

        Args:
            workers: how many at a time; None: as many as there are processors for this process.
            progress: called with the number of those that are through, from this thread.
        """
        outcomes = []
        with ThreadPoolExecutor(workers or _processors()) as pool:
            try:
                for outcome in pool.map(
                    lambda job: self.check(job.program, job.entry_point, job.tests, job.trusted), jobs
                ):
                    outcomes.append(outcome)
                    if progress is not None:
                        progress(len(outcomes))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return outcomes

    def _outcome(self, program: str, entry_point: str | None, judge: dict[str, str] | None) -> Outcome:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(_nameless(program))]
            if judge is not None:
                files.append(stack.enter_context(_nameless(json.dumps(judge))))
            strict = self.settings.mode == "strict"
            folder = "/tmp" if strict else stack.enter_context(_folder())
            found = self._launch(
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
                    "memory": self.settings.memory_mb << 20,
                    "file": self.settings.file_mb << 20,
                    "processes": self.settings.max_processes,
                    "output": self.settings.output_kb << 10,
                },
                *(file.fileno() for file in files),
            )
        if "missing" in found:
            raise UserError([f"sandbox={self.settings.mode}: there is no {wall}" for _, wall in found["missing"]], _FIX)
        message = visible(found["message"].replace("\n", " "))[:MESSAGE_CHARS]
        passed = found["reason"] == "passed"
        return Outcome(passed, found["reason"], message, float(found["seconds"]), visible(found["output"]))

    def _launch(self, config: dict[str, Any], *files: int) -> dict[str, Any]:
        """Start the launcher, and read its line. All that it started has ended when this returns."""
        watched, held = os.pipe()  # the jail ends when the other end is closed: it does not outlive this process
        try:
            with subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", str(_LAUNCHER), json.dumps(config)],
                stdin=watched,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
                pass_fds=files,
                start_new_session=True,
                cwd="/",
            ) as process:
                try:
                    out, err = process.communicate(timeout=config.get("seconds", 0.0) + GRACE)
                except subprocess.TimeoutExpired:
                    return {"reason": "timeout", "message": "the jail did not end", "seconds": GRACE, "output": ""}
                finally:
                    process.kill()
        finally:
            os.close(watched)
            os.close(held)
        try:
            return json.loads(out)
        except ValueError:
            raise UserError(f"the sandbox failed: {err.decode(errors='replace').strip()[-2000:]}", _FIX) from None


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
