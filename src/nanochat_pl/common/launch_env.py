"""Rank and world size from the launcher's environment variables. Plain Python: the console asks it too."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from nanochat_pl.common.errors import UserError


class LaunchEnv(NamedTuple):
    """Where this process stands among those that were started together."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


ALONE = LaunchEnv(0, 1, 0, 1)
MAX_PROCESSES = 100_000


def launch_env() -> LaunchEnv:
    """What the launcher says, whether the processes speak to each other yet or not; alone where there is none.

    Raises:
        UserError: what it says is not complete, or not so.
    """
    world_size = _number("WORLD_SIZE", 1, 1, MAX_PROCESSES)
    if world_size == 1:
        return ALONE
    if "RANK" not in os.environ and os.environ.get("NODE_RANK") == "0":  # a Trainer that starts its own processes
        local = _number("LOCAL_RANK", 0, 0, world_size - 1)
        return LaunchEnv(local, world_size, local, world_size)
    rank = _number("RANK", None, 0, world_size - 1)
    local_world_size = _number("LOCAL_WORLD_SIZE", world_size, 1, world_size)
    local_rank = _number("LOCAL_RANK", rank, 0, local_world_size - 1)
    return LaunchEnv(rank, world_size, local_rank, local_world_size)


def usable_cpus() -> int:
    """CPUs that this process may use, not those that the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def master_address() -> tuple[str, int]:
    """Where the processes find each other: host and port.

    Raises:
        UserError: the launcher does not say it.
    """
    host = os.environ.get("MASTER_ADDR", "").strip()
    if not host:
        raise UserError(
            f"MASTER_ADDR is missing, and WORLD_SIZE={os.environ.get('WORLD_SIZE')}.",
            f"MASTER_ADDR is the host of process 0, MASTER_PORT a free port there. {_FIX}",
        )
    return host, _number("MASTER_PORT", None, 1, 65535)


def launcher_hosts_store() -> bool:
    """Whether the launcher hosts the store by which the processes find each other; if not, process 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


_FIX = (
    "Launchers such as torchrun set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and on several machines LOCAL_RANK"
    " and LOCAL_WORLD_SIZE; one process alone needs none of them: unset WORLD_SIZE."
)


def _number(name: str, default: int | None, least: int, most: int) -> int:
    """A whole number of the environment."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not re.fullmatch(r"\s*[0-9]+\s*", text) or not least <= int(text) <= most:
        given = f"{name}={text!r}" if name in os.environ else f"{name} is missing: it"
        world_size = "" if name == "WORLD_SIZE" else f", and WORLD_SIZE={os.environ.get('WORLD_SIZE')}"
        raise UserError(f"{given} must be one whole number from {least} to {most}{world_size}.", _FIX)
    return int(text)


_launch = ""


def name_launch(name: str) -> None:
    """Note a name that all processes of this launch have, and no other launch."""
    global _launch
    _launch = name


def launch_on_node() -> str:
    """A name that this launch's processes on this node have, and nobody else; empty where none was noted."""
    place = launch_env()
    return f"{_launch}-{place.rank - place.local_rank}" if _launch else ""
