"""How the processes that a launcher has started find each other, and what is said where they do not."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.launch_env import LaunchEnv, launcher_hosts_store, master_address

TIMEOUT_SECONDS = 300.0
NOTICE_SECONDS = 15.0
_MAX_NAMED = 8


def rendezvous(env: LaunchEnv, timeout: float = TIMEOUT_SECONDS, notice_after: float = NOTICE_SECONDS) -> Any:
    """Wait until all processes have come; gives the store (of torch.distributed) that they share.

    Args:
        env: of this process.
        timeout: seconds after which it gives up.
        notice_after: seconds after which it says on stderr what it waits for.

    Raises:
        UserError: the port is taken, the host cannot be reached, or not all have come: names those which have not.
    """
    from torch.distributed import PrefixStore, TCPStore

    host, port = master_address()
    address = f"MASTER_ADDR={host}, MASTER_PORT={port}"
    is_host = env.rank == 0 and not launcher_hosts_store()

    def what_keeps_from_connecting() -> str:
        # Asked before the store's client is made, which would wait deaf to Ctrl-C and print a stack of its own.
        try:
            socket.create_connection((host, port), timeout=5.0).close()
        except OSError as error:
            return f"to reach {address}: {error}"
        return ""

    if not is_host and (problem := _wait_until_empty(what_keeps_from_connecting, env.rank, timeout, notice_after)):
        raise UserError(
            f"process {env.rank} has waited {timeout:.0f} s {problem}.",
            "Does process 0 (or the launcher) run on that host, is the port the same everywhere, and does the network"
            f" let it through? WORLD_SIZE={env.world_size} stands in the environment: one process alone needs it"
            " unset.",
        )
    names = [f"here/{rank}" for rank in range(env.world_size)]

    def who_is_missing() -> str:
        missing = [] if store.check(names) else [str(n) for n, name in enumerate(names) if not store.check([name])]
        more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        listed = ", ".join(missing[:_MAX_NAMED])
        return f"for process {listed}{more} of WORLD_SIZE={env.world_size}" if missing else ""

    try:
        server = TCPStore(
            host,
            port,
            is_master=is_host,
            wait_for_workers=False,
            multi_tenant=is_host,
            timeout=timedelta(seconds=max(timeout, 1)),
        )
        # A launcher that starts the workers again may keep its store.
        store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", server)
        store.set(names[env.rank], "")
        problem = _wait_until_empty(who_is_missing, env.rank, timeout, notice_after)
    except RuntimeError as error:
        doing = "listen" if is_host else "stay in contact with the other processes"
        raise UserError(
            f"{address}: process {env.rank} cannot {doing} there: {str(error).partition(chr(10))[0]}",
            "Is the port free, and are the other processes still there?",
        ) from error
    if problem:
        raise UserError(
            f"process {env.rank} has waited {timeout:.0f} s {problem}, in vain.",
            "Is the same command started on each machine, with the same MASTER_ADDR and MASTER_PORT, and each RANK"
            " once? One process alone needs WORLD_SIZE unset.",
        )
    return store


def _wait_until_empty(pending: Callable[[], str], rank: int, timeout: float, notice_after: float) -> str:
    """Ask what is waited for until it is nothing or the time is over; gives the last answer."""
    begin = time.monotonic()
    while (what := pending()) and (waited := time.monotonic() - begin) < timeout:
        if waited > notice_after:
            notice_after = 2 * waited
            print(f"process {rank}: waits {what}, for {waited:.0f} s now", file=sys.stderr, flush=True)
        time.sleep(min(0.02 + waited / 4, 1.0))
    return what
