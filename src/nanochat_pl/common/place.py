"""Where this process stands among those that a launcher started together. Plain Python: the console asks it too."""

from __future__ import annotations

import os
from typing import NamedTuple


class Place(NamedTuple):
    """Where this process stands among those that were started together."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


ALONE = Place(0, 1, 0, 1)


def launched_place() -> Place:
    """What the launcher says, whether the processes speak to each other yet or not; alone where there is none."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return ALONE
    return Place(
        rank,
        world_size,
        int(os.environ.get("LOCAL_RANK", rank)),
        int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
    )


_launch = ""


def name_launch(name: str) -> None:
    """Note a name that all processes of this launch have, and no other launch."""
    global _launch
    _launch = name


def launch_on_node() -> str:
    """A name that this launch's processes on this node have, and nobody else; empty where none was noted."""
    place = launched_place()
    return f"{_launch}-{place.rank - place.local_rank}" if _launch else ""
