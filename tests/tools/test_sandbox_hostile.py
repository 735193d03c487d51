"""Programs that attack: contained, ended in time, scored as failures, and nothing is left of them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanochat_pl.tools.sandbox.sandbox import Sandbox
from nanochat_pl.tools.sandbox.settings import SandboxSettings
from tests.helpers import ordinary_user
from tests.tools.hostile import HOSTILE, Hostile

SECRET = "the-secret-of-the-canary"
# A number of this test run's own, added to the seconds: all processes of a sandbox have it in their command lines.
MARK = os.getpid() / 1e8


@dataclass
class World:
    """What an attack aims at."""

    folder: Path
    listeners: list[socket.socket]
    datagrams: socket.socket
    victim: subprocess.Popen[bytes]

    @property
    def canary(self) -> Path:
        return self.folder / "canary"

    @property
    def names(self) -> dict[str, object]:
        return {
            "CANARY": str(self.canary),
            "SECRET": SECRET,
            "PORT": self.listeners[0].getsockname()[1],
            "SOCKET": self.listeners[1].getsockname(),
            "DATAGRAMS": self.datagrams.getsockname(),
            "VICTIM": self.victim.pid,
        }

    def assert_unharmed(self) -> None:
        assert [path.name for path in self.canary.iterdir()] == ["secret.txt"]
        secret = self.canary / "secret.txt"
        assert secret.read_text() == SECRET
        assert secret.stat().st_mode & 0o777 == 0o666 and secret.stat().st_mtime > 1
        assert self.victim.poll() is None
        for listener in self.listeners:
            with pytest.raises(BlockingIOError):
                listener.accept()
        with pytest.raises(BlockingIOError):
            self.datagrams.recv(100)
        assert list((self.folder / "tmp").iterdir()) == []
        assert str(self.folder) not in Path("/proc/self/mountinfo").read_text()
        assert [pid for pid in Path("/proc").glob("[0-9]*") if f"{MARK:.8f}"[1:].encode() in _command(pid)] == []


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with _world([]) as world:
        monkeypatch.setattr(tempfile, "tempdir", str(world.folder / "tmp"))
        yield world


@contextlib.contextmanager
def _world(as_user: list[str]) -> Iterator[World]:
    """One that everybody may enter and change, as far as the system is concerned."""
    with contextlib.ExitStack() as stack:
        # Not in /tmp, which a sandbox covers with one of its own, so that a missing root would go unseen.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hostile-", dir="/var/tmp")))
        for path in (folder, folder / "tmp", folder / "canary"):
            path.mkdir(exist_ok=True)
            path.chmod(0o777)
        (folder / "canary" / "secret.txt").write_text(SECRET)
        (folder / "canary" / "secret.txt").chmod(0o666)
        listeners = []
        for family, address in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, str(folder / "socket"))):
            listener = stack.enter_context(socket.socket(family))
            listener.bind(address)
            listener.listen()
            listener.setblocking(False)
            listeners.append(listener)
        datagrams = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        datagrams.bind(str(folder / "datagrams"))
        datagrams.setblocking(False)
        for path in (folder / "socket", folder / "datagrams"):
            path.chmod(0o777)
        if as_user:
            for path in (folder / "canary", folder / "canary" / "secret.txt"):
                os.chown(path, ordinary_user.USER, ordinary_user.USER)
        environment = {**os.environ, "CANARY_SECRET": SECRET}
        victim = stack.enter_context(subprocess.Popen([*as_user, "sleep", "600"], env=environment))
        try:
            yield World(folder, listeners, datagrams, victim)
        finally:
            victim.kill()


@pytest.fixture(scope="module", params=["strict", "weak"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return Sandbox(SandboxSettings(mode=request.param, memory_mb=256))


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_contained(sandbox: Sandbox, world: World, hostile: Hostile) -> None:
    outcome = hostile.run(sandbox, world.names, MARK)
    print(outcome)
    assert not outcome.passed
    assert outcome.reason in hostile.reasons
    world.assert_unharmed()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["strict", "weak"])
def test_contained_as_an_ordinary_user(mode: str) -> None:
    ordinary_user.needed()
    with _world(ordinary_user.AS_USER) as world:
        script = str(Path(__file__).with_name("hostile.py"))
        said = ordinary_user.run(script, mode, json.dumps(world.names), str(MARK), TMPDIR=str(world.folder / "tmp"))
        world.assert_unharmed()
    found = [json.loads(line) for line in said.splitlines()]
    assert len(found) == len(HOSTILE)
    assert [outcome for _, contained, *outcome in found if not contained] == []
