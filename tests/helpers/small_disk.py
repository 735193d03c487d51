"""A small disk, to be filled."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

# Waits for a line, or for the end of the process that would write one: no mount is left, not even of killed tests.
_SCRIPT = """
trap '' INT TERM HUP
mount -t tmpfs -o "size=$1" tmpfs "$2" || exit 1
echo mounted
read -r line
umount --lazy "$2"
"""


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """``folder`` on a disk of ``size`` (``3m``, ``1500k``); the test is skipped where nothing may be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        pytest.skip("needs to mount a small disk")
    command = ["sh", "-c", _SCRIPT, "sh", size, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as keeper:
        assert keeper.stdin is not None and keeper.stdout is not None
        if keeper.stdout.readline() != "mounted\n":
            pytest.skip("needs to mount a small disk")
        try:
            yield folder
        finally:
            keeper.stdin.write("\n")
            keeper.stdin.close()
            assert keeper.wait(30) == 0, "still mounted"


def enlarge(disk: Path, size: str) -> None:
    """Give a small disk more room."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
