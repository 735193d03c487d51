"""How processes find each other: quickly, or with an error that says who is missing."""

from __future__ import annotations

import threading

import pytest
from torch.distributed import TCPStore

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.launch_env import LaunchEnv
from nanochat_pl.distributed.rendezvous import rendezvous
from tests.helpers.launch import free_port


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return port


@pytest.mark.slow
def test_the_others_do_not_come(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="process 0 has waited 2 s for process 1, 2 of WORLD_SIZE=3, in vain"):
        rendezvous(LaunchEnv(0, 3, 0, 3), timeout=2.0, notice_after=0.1)
    assert "process 0: waits for process 1, 2 of WORLD_SIZE=3, for 0 s now" in capsys.readouterr().err


def test_the_first_does_not_come(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=f"process 1 has waited 2 s to reach .*MASTER_PORT={port}: .*refused"):
        rendezvous(LaunchEnv(1, 2, 1, 2), timeout=2.0, notice_after=0.1)
    assert f"process 1: waits to reach MASTER_ADDR=127.0.0.1, MASTER_PORT={port}: " in capsys.readouterr().err


def test_a_host_without_an_address(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    with pytest.raises(UserError, match=r"has waited 1 s to reach MASTER_ADDR=nowhere\.invalid"):
        rendezvous(LaunchEnv(1, 2, 1, 2), timeout=1.0)


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    taken = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(taken.port))
    with pytest.raises(UserError, match=f"MASTER_PORT={taken.port}: process 0 cannot listen there"):
        rendezvous(LaunchEnv(0, 2, 0, 2))


@pytest.mark.parametrize("by_launcher", [False, True])
def test_all_come(by_launcher: bool, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, whoever hosts; and again, as after a stop and a start."""
    if by_launcher:
        launcher = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        monkeypatch.setenv("MASTER_PORT", str(launcher.port))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    stores: dict[int, object] = {}

    def come(rank: int) -> None:
        stores[rank] = rendezvous(LaunchEnv(rank, 3, rank, 3), timeout=60.0)

    for _ in range(2):
        threads = [threading.Thread(target=come, args=(rank,)) for rank in (2, 1, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(stores) == [0, 1, 2]
        stores[0].set("a", "b")  # type: ignore[attr-defined]
        assert stores[2].get("a") == b"b"  # type: ignore[attr-defined]
