"""Python as a user who has no rights and no other processes: for tests that run as root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

USER = 61_234
# The limit is there for the day on which the sandbox's own fails: without one, a fork bomb takes the whole machine.
AS_USER = ["prlimit", "--nproc=1000", "setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
_PYTHON = "/usr/bin/python3"
# The libraries are those of the tests: the user may read them, though not run the Python of the environment.
_PATHS = (str(Path(__file__).parents[2] / "src"), sysconfig.get_path("purelib"))
_ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(_PATHS), "PYTHONDONTWRITEBYTECODE": "1"}


def needed() -> None:
    """Skip the test where that cannot be tried."""
    trial = [
        *AS_USER,
        _PYTHON,
        "-c",
        "import sys, nanochat_pl.tools.sandbox.sandbox; sys.exit(sys.version_info < (3, 11))",
    ]
    if os.geteuid() != 0 or not all(map(shutil.which, ("setpriv", "prlimit"))) or not Path(_PYTHON).exists():
        pytest.skip("needs to be root, setpriv and the system's Python")
    if subprocess.run(trial, env=_ENVIRONMENT, capture_output=True, cwd="/").returncode:
        pytest.skip("an ordinary user cannot run this package with the system's Python")


def run(*command: str, **environment: str) -> str:
    """What the system's Python prints."""
    needed()
    env = {**_ENVIRONMENT, **environment}
    done = subprocess.run([*AS_USER, _PYTHON, *command], env=env, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
