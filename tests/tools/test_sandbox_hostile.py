"""Programs that attack: contained, ended in time, scored as failures, and nothing is left of them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanochat_pl.tools.sandbox import Sandbox, SandboxSettings
from tests.tools.hostile import HOSTILE, TESTS, Hostile

SECRET = "the-secret-of-the-canary"
# A number of this test run's own: all processes of a sandbox have it in their command lines.
SECONDS = 3 + os.getpid() / 1e8


@dataclass
class World:
    """What an attack aims at."""

    folder: Path
    listeners: list[socket.socket]
    victim: subprocess.Popen[bytes]

    @property
    def canary(self) -> Path:
        return self.folder / "canary"

    def program(self, hostile: Hostile) -> str:
        names = {
            "CANARY": self.canary,
            "SECRET": SECRET,
            "PORT": self.listeners[0].getsockname()[1],
            "SOCKET": self.listeners[1].getsockname(),
            "VICTIM": self.victim.pid,
        }
        text = hostile.program
        for name, value in names.items():
            text = text.replace(name, str(value))
        return text

    def assert_unharmed(self) -> None:
        assert [path.name for path in self.canary.iterdir()] == ["secret.txt"]
        assert (self.canary / "secret.txt").read_text() == SECRET
        assert self.victim.poll() is None
        for listener in self.listeners:
            with pytest.raises(BlockingIOError):
                listener.accept()
        assert list((self.folder / "tmp").iterdir()) == []
        assert str(self.folder) not in Path("/proc/self/mountinfo").read_text()
        assert [pid for pid in Path("/proc").glob("[0-9]*") if str(SECONDS).encode() in _command(pid)] == []


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name in ("tmp", "canary"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
    (tmp_path / "canary" / "secret.txt").write_text(SECRET)
    (tmp_path / "canary" / "secret.txt").chmod(0o666)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with contextlib.ExitStack() as stack:
        listeners = []
        for family, address in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, str(tmp_path / "socket"))):
            listener = stack.enter_context(socket.socket(family))
            listener.bind(address)
            listener.listen()
            listener.setblocking(False)
            listeners.append(listener)
        victim = stack.enter_context(subprocess.Popen(["sleep", "600"], env={**os.environ, "CANARY_SECRET": SECRET}))
        try:
            yield World(tmp_path, listeners, victim)
        finally:
            victim.kill()


@pytest.fixture(scope="module", params=["strict", "weak"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return Sandbox(SandboxSettings(mode=request.param, seconds=SECONDS, memory_mb=256))


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_contained(sandbox: Sandbox, world: World, hostile: Hostile) -> None:
    outcome = sandbox.check(world.program(hostile), "f", TESTS)
    print(outcome)
    assert not outcome.passed
    assert outcome.reason in hostile.reasons
    world.assert_unharmed()
