"""The collectives: no-ops alone, the real ones in a process group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nanochat_pl.common import collectives


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def use_all_of_them() -> None:
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    for collective in (collectives.all_reduce_sum, collectives.all_reduce_max, collectives.broadcast):
        tensor = torch.tensor([1.0, 2.0])
        assert collective(tensor) is tensor
        assert tensor.tolist() == [1.0, 2.0]
    collectives.barrier()


def test_alone_nothing_happens() -> None:
    assert not collectives.is_distributed()
    use_all_of_them()


def test_in_a_process_group(group_of_one: None) -> None:
    assert collectives.is_distributed()
    use_all_of_them()
