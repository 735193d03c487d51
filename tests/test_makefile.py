"""What `make` does before it runs anything: one environment, made once, by a Python that is new enough."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A Python that makes no environment, but writes down when it begins and ends to install into it.
PRETENDED = """#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip") echo begin >> log; sleep 0.5; echo end >> log ;;
  "-m pytest") echo tested >> log ;;
  *) exec {python} "$@" ;;
esac
"""

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "hashes.txt"):
        shutil.copy(ROOT / name, tmp_path)
    pretended = tmp_path / "python"
    pretended.write_text(PRETENDED.format(python=sys.executable))
    pretended.chmod(0o755)
    return tmp_path


def make(checkout: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    command = ["make", f"PYTHON={checkout / 'python'}", *arguments]
    return subprocess.Popen(
        command, cwd=checkout, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_two_terminals_install_once(checkout: Path) -> None:
    """The second removed what the first was installing, and pip ended with a traceback."""
    both = [make(checkout, "test"), make(checkout, "setup")]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted((checkout / "log").read_text().split()) == ["begin", "end", "tested"]


def test_an_environment_that_is_there_is_not_installed_again(checkout: Path) -> None:
    said = [make(checkout, "setup").communicate(timeout=60)[0] for _ in range(2)]
    assert [text.count("3 GB") for text in said] == [1, 0], said
    assert all(text.endswith("Now: source .venv/bin/activate\n") for text in said), said
    assert (checkout / "log").read_text().split() == ["begin", "end"]
