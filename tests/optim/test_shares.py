"""How parameters are cut into shares; no processes are needed for that."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from nanochat_pl.optim.gradient_norm import gradient_norm
from nanochat_pl.optim.muon import adamw_update
from nanochat_pl.optim.pieces import ALIGNMENT, PIECE_OF_NORM, adamw_quantum
from nanochat_pl.optim.sharding import Shard, moment_shapes


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several cut a tensor among themselves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shards(shapes: list[tuple[int, ...]], quantum: int, world_size: int, at_end: bool = False) -> list[Shard]:
    parameters = [torch.randn(shape) for shape in shapes]
    names = [f"p{i}" for i in range(len(shapes))]
    return [Shard(names, parameters, quantum, rank, world_size, at_end) for rank in range(world_size)]


def test_every_element_is_in_one_shard_and_cuts_lie_at_the_quantum() -> None:
    draw = random.Random(0)
    for _ in range(300):
        world_size, shape = draw.randint(1, 9), (draw.randint(1, 40), draw.randint(1, 9))
        stack = draw.random() < 0.5
        size, quantum = (draw.randint(1, 20), shape[0] * shape[1]) if stack else (1, ALIGNMENT)
        all_shards = shards([shape] * size, quantum, world_size, draw.random() < 0.5)
        assert all_shards[0].begin == 0 and all_shards[-1].end == size * shape[0] * shape[1]
        for shard, after in pairwise(all_shards):
            assert shard.end == after.begin and (shard.begin % quantum == 0 or shard.begin == shard.total)
        assert all_shards[0].before == 0 or all_shards[-1].begin < all_shards[-1].end, "laid to the end"
        for shard in all_shards:
            assert shard.end - shard.begin <= shard.part < shard.total / world_size + quantum
        own = torch.cat([shard.own_values() for shard in all_shards])
        assert torch.equal(own, torch.stack(list(all_shards[0].parameters)).view(-1))


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("shape", [(13, 7), (7, 13), (41, 24), (1, 6)])
def test_the_parts_of_a_moment_make_up_the_whole(
    kind: str, world_size: int, shape: tuple[int, int], at_end: bool
) -> None:
    count, quantum = (5, shape[0] * shape[1]) if kind == "muon" else (1, ALIGNMENT)
    all_shards = shards([shape] * count, quantum, world_size, at_end)
    for moment, whole_shape in moment_shapes(kind, shape).items():
        wholes = [torch.randn(whole_shape) for _ in range(count)]
        for shard in all_shards:
            shard.allocate({moment: whole_shape})
            for i, whole in enumerate(wholes):
                shard.load_moment(i, moment, whole)
        if whole_shape:
            for i, whole in enumerate(wholes):
                parts = torch.cat([shard.own_moment(i, moment, whole_shape) for shard in all_shards])
                assert torch.equal(parts.view(whole_shape), whole)
            parts = torch.cat([shard.moments[moment] for shard in all_shards])
            assert torch.equal(parts, torch.stack(wholes).view(-1)), "nothing is kept besides"
        else:
            assert all(torch.equal(shard.moments[moment], wholes[0]) for shard in all_shards)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("world_size", [2, 3, 5, 7])
@pytest.mark.parametrize("length", [1, 7, 31, 63, 64, 65, 193, 984, 4099, 100_003])
def test_adamw_of_shards_has_the_bits_of_the_whole(length: int, world_size: int) -> None:
    """Vectorised kernels round what is left after the last full vector otherwise; see ALIGNMENT."""
    torch.manual_seed(length)
    group = {"lr": 0.3, "betas": (0.8, 0.995), "weight_decay": 0.01, "eps": 1e-10}
    all_shards = shards([(length,)], ALIGNMENT, world_size)
    whole = all_shards[0].parameters[0].clone()
    state = {"step": torch.zeros(()), "exp_avg": torch.zeros(length), "exp_avg_sq": torch.zeros(length)}
    own = [shard.own_values() for shard in all_shards]
    for shard in all_shards:
        shard.allocate(moment_shapes("adamw", (length,)))
    for _ in range(5):
        gradient = torch.randn(length)
        adamw_update(group, [whole], [gradient], [state])
        for shard, values in zip(all_shards, own, strict=True):
            adamw_update(group, [values], [gradient[shard.begin : shard.end].clone()], [shard.moments])
    assert torch.equal(torch.cat(own), whole)
    assert torch.equal(torch.cat([shard.moments["exp_avg_sq"] for shard in all_shards]), state["exp_avg_sq"])


def norm_of(tensors: list[torch.Tensor]) -> torch.Tensor:
    parameters = [torch.nn.Parameter(tensor) for tensor in tensors]
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.grad = tensor
    return gradient_norm([], [{"kind": "adamw", "params": parameters}])


def test_the_norm_of_many_elements_is_sound() -> None:
    """One running sum in float32 was 3e-3 off at this size."""
    tensors = [torch.rand(50, 400_000), torch.randn(7), torch.zeros(0), torch.tensor(0.1).bfloat16()]
    exact = sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5
    norm = norm_of(tensors)
    assert norm.dtype == torch.float32 and norm.shape == () and abs(float(norm) / exact - 1) < 1e-6
    assert norm_of([torch.zeros(0)]).tolist() == 0.0
    assert not norm_of([torch.tensor([1.0, float("nan")])]).isfinite()


def test_what_stays_together_of_a_parameter() -> None:
    for numel in [*range(1, 3000), 13_920, 2**18, 2**20 + 1, 10**8]:
        quantum = adamw_quantum(numel)
        assert quantum % ALIGNMENT == 0 and PIECE_OF_NORM % quantum == 0
        assert quantum in (ALIGNMENT, PIECE_OF_NORM) or 16 <= numel / quantum < 32
