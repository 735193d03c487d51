"""How the processes that a launcher has started find each other, and what is said where they do not."""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.launch_env import LaunchEnv, launcher_hosts_store, master_address

SECONDS_TO_MEET = 300.0
SECONDS_IN_SILENCE = 15.0


def meet(place: LaunchEnv, seconds: float = SECONDS_TO_MEET, in_silence: float = SECONDS_IN_SILENCE) -> Any:
    """Wait until all processes have come; gives the store (of torch.distributed) that they share.

    Args:
        place: of this process.
        seconds: after which it gives up.
        in_silence: seconds after which it says on stderr for whom it waits.

    Raises:
        UserError: not all have come; names those which have not.
    """
    from torch.distributed import PrefixStore, TCPStore

    waiting = _Waiting(place, seconds, in_silence)
    host, port = master_address()
    hosts = place.rank == 0 and not launcher_hosts_store()
    if not hosts:
        _reach(host, port, waiting)
    try:
        store = TCPStore(
            host,
            port,
            is_master=hosts,
            wait_for_workers=False,
            multi_tenant=hosts,
            timeout=timedelta(seconds=max(seconds, 1)),
        )
        # A launcher that starts the workers again may keep its store.
        shared = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        _wait_for_all(shared, place, waiting)
    except RuntimeError as error:
        doing = "listen" if hosts else "stay in contact with the other processes"
        raise UserError(
            f"MASTER_ADDR={host}, MASTER_PORT={port}: process {place.rank} cannot {doing} there:"
            f" {str(error).partition(chr(10))[0]}",
            "Is the port free, and are the other processes still there?",
        ) from error
    return shared


class _Waiting:
    def __init__(self, place: LaunchEnv, seconds: float, in_silence: float) -> None:
        self.place, self.seconds = place, seconds
        self.begin, self.speaks_at, self.pause = time.monotonic(), in_silence, 0.02

    def continues(self, what: str) -> bool:
        """Whether there is time left; waits a little, and says now and then for what."""
        waited = time.monotonic() - self.begin
        if waited > self.seconds:
            return False
        if waited > self.speaks_at:
            self.speaks_at = max(2 * self.speaks_at, waited)
            print(f"process {self.place.rank}: {what}, for {waited:.0f} s now", file=sys.stderr, flush=True)
        time.sleep(self.pause)
        self.pause = min(1.5 * self.pause, 1.0)
        return True


def _reach(host: str, port: int, waiting: _Waiting) -> None:
    """Wait until somebody listens there: a client of the store would wait deaf to Ctrl-C, and print its own stack."""
    problem: OSError | None = None
    while waiting.continues(f"waits to reach MASTER_ADDR={host}, MASTER_PORT={port} ({problem})"):
        try:
            with socket.create_connection((host, port), timeout=5.0):
                return
        except OSError as error:
            problem = error
    raise UserError(
        f"MASTER_ADDR={host}, MASTER_PORT={port}: process {waiting.place.rank} has not reached it in"
        f" {waiting.seconds:.0f} s: {problem}.",
        "Does process 0 (or the launcher) run on that host, is the port the same everywhere, and does the network let"
        f" it through? WORLD_SIZE={waiting.place.world_size} stands in the environment: one process alone needs it"
        " unset.",
    )


def _wait_for_all(store: Any, place: LaunchEnv, waiting: _Waiting) -> None:
    names = [f"here/{rank}" for rank in range(place.world_size)]
    store.set(names[place.rank], "")
    while not store.check(names):
        missing = [str(rank) for rank, name in enumerate(names) if not store.check([name])]
        many = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        listed = f"{', '.join(missing[:8])}{many} of WORLD_SIZE={place.world_size}"
        if missing and not waiting.continues(f"waits for process {listed}"):
            raise UserError(
                f"process {place.rank} has waited {waiting.seconds:.0f} s for process {listed}, in vain.",
                "Is the same command started on each machine, with the same MASTER_ADDR and MASTER_PORT, and each RANK"
                " once? One process alone needs WORLD_SIZE unset.",
            )
