"""MuonAdamW on two, three and four processes against one."""

from __future__ import annotations

import itertools
import random
import time
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat_pl.bundle.tensors import TensorStream, save_tensors
from nanochat_pl.cli.train import compose_train
from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import to_plain
from nanochat_pl.distributed import collectives
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import MuonSettings, OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.fully_sharded import make_shards
from nanochat_pl.optim.gradient_norm import gradient_norm
from nanochat_pl.optim.muon_adamw import MuonAdamW
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.optim.schedules import StepValues
from tests.helpers.alive_bytes import AliveBytes
from tests.helpers.processes import run
from tests.helpers.small_optim import make_optimizer, make_parameters, set_gradients

SEVERAL = [2, 3, 4]
LAST = 10
VOCAB = 37  # so that no share of an embedding is as long as another


def tiny(compile_muon: bool = False) -> tuple[GPT, MuonAdamW]:
    """Depth 3: stacks of 12, 3, 3 and 2 matrices. No weight is zero, which would hide the gradient of others."""
    config = resolve_model(ModelSettings(depth=3, aspect_ratio=8, head_dim=8, sequence_len=16), VOCAB, "float32")
    net = init_weights(GPT(config).materialise(), seed=1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    hyper = resolve_hyperparameters(OptimSettings(compile=compile_muon), width=config.width)
    optimizer = build_optimizer(net.named_parameters(), parameter_roles(net), hyper)
    optimizer.allocate_state()
    return net, optimizer


def take_steps(net: GPT, optimizer: MuonAdamW, first: int, last: int, terms: int, late: bool = False) -> list[float]:
    """Steps on ``terms`` micro-batches in all; a process for which there is none has one without targets."""
    rank, world_size = collectives.rank(), collectives.world_size()
    draw, norms = random.Random(rank), []
    for step in range(first, last):
        for term in range(rank, max(terms, rank + 1), world_size):
            tokens = torch.randint(VOCAB, (2, 17), generator=torch.Generator().manual_seed(100 * step + term))
            inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
            if term >= terms:
                targets = torch.full_like(targets, IGNORE_INDEX)
            (net.weighted_loss(inputs, targets) / (terms * targets.numel())).backward()
        gradients = [parameter.grad for parameter in net.parameters()]
        if late:
            time.sleep(draw.choice([0.0, 0.0, 0.03]))
        norms.append(float(optimizer.reduce_gradients()))
        if world_size > 1:
            assert all(parameter.grad is None for parameter in net.parameters())
            for gradient in gradients:  # no longer of use to anybody
                gradient.fill_(float("nan"))
        del gradients
        if late:
            time.sleep(draw.choice([0.0, 0.0, 0.03]))
        optimizer.set_step_values(StepValues(1 / (step + 1), 0.85 + step / 100, 1 - step / 20))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def outcome(net: GPT, optimizer: MuonAdamW) -> dict[str, Any]:
    optimizer.consolidate_state_dict()
    return {
        "parameters": {name: parameter.detach() for name, parameter in net.named_parameters()},
        "state": optimizer.state_dict() if collectives.is_rank_zero() else {},
        "moments": optimizer.moments_by_name(),
    }


def train(last: int, terms: int, late: bool = False, compile_muon: bool = False) -> dict[str, Any]:
    net, optimizer = tiny(compile_muon)
    norms = take_steps(net, optimizer, 0, last, terms, late)
    return outcome(net, optimizer) | {"norms": norms}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert list(a) == list(b) and a
    return [name for name in a if not torch.equal(a[name], b[name]) or a[name].dtype != b[name].dtype]


def flat(state: dict[str, Any]) -> dict[str, Tensor]:
    return {f"{name}.{key}": moment for name, moments in state["state"].items() for key, moment in moments.items()}


def assert_equal(found: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """Parameters on every process, and the state on the first."""
    for each in found:
        assert differing(each["parameters"], alone["parameters"]) == []
        assert each["norms"] == alone["norms"]
    assert differing(found[0]["moments"], alone["moments"]) == []
    assert differing(flat(found[0]["state"]), flat(alone["state"])) == []
    assert found[0]["state"]["groups"] == alone["state"]["groups"]
    assert all(each["moments"] == each["state"] == {} for each in found[1:])


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    (found,) = run(1, train, LAST, 2)
    assert differing(flat(found["state"]), found["moments"]) == []
    return found


@pytest.mark.parametrize("world_size", [2, *(pytest.param(number, marks=pytest.mark.slow) for number in (3, 4))])
def test_ten_steps_have_the_bits_of_one_process(world_size: int, alone: dict[str, Any]) -> None:
    """Each process has one micro-batch, and each sum two terms: there is no order of summation."""
    assert_equal(run(world_size, train, LAST, 2), alone)


@pytest.mark.parametrize("world_size", SEVERAL)
def test_sums_of_more_terms_differ_by_rounding(world_size: int) -> None:
    (one,) = run(1, train, 1, 8)
    found = run(world_size, train, 1, 8)
    for each in found:
        assert differing(each["parameters"], found[0]["parameters"]) == []
    several, single = (torch.cat([p.view(-1) for p in each["parameters"].values()]) for each in (found[0], one))
    assert float((several - single).norm() / single.norm()) < 1e-6


def debug_level() -> str:
    return torch.distributed.get_debug_level().name


@pytest.mark.slow
def test_torchs_own_checks_of_the_collectives_are_clean(alone: dict[str, Any]) -> None:
    checked = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    assert run(2, debug_level, environment=checked) == ["DETAIL"] * 2 and run(2, debug_level) == ["OFF"] * 2
    assert_equal(run(3, train, LAST, 2, environment=checked), alone)


@pytest.mark.slow
def test_processes_that_are_late_at_random_change_nothing(alone: dict[str, Any]) -> None:
    assert_equal(run(4, train, LAST, 2, True), alone)


# States, from each number of processes to each.


def go_on(file: str, first: int) -> list[dict[str, Any]]:
    saved = torch.load(file, weights_only=True, mmap=True)
    net, optimizer = tiny()
    net.load_state_dict(saved["parameters"])
    assert optimizer.load_state_dict(saved["state"]) == []
    loaded = outcome(net, optimizer)
    norms = take_steps(net, optimizer, first, LAST, 2)
    return [loaded, outcome(net, optimizer) | {"norms": norms}]


@pytest.mark.parametrize("before", [3, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2, 4))])
def test_a_state_of_any_number_of_processes_goes_on_with_any(
    before: int, tmp_path: Path, alone: dict[str, Any]
) -> None:
    saved = run(before, train, 6, 2)[0]
    torch.save(saved, tmp_path / "resume.ckpt")
    rest = alone | {"norms": alone["norms"][6:]}
    for after in (1, 2, 3, 4):
        found = run(after, go_on, str(tmp_path / "resume.ckpt"), 6)
        assert differing(found[0][0]["moments"], saved["moments"]) == []
        assert_equal([last for _, last in found], rest)


def refused() -> list[str]:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters)
    moments = {key: torch.ones(9) for key in optimizer.moment_shapes()}
    messages = []
    for attempt in (
        lambda: optimizer.load_moments(moments),
        lambda: optimizer.load_state_dict({"state": {}}),
        optimizer.state_dict,
    ):
        try:
            attempt()
        except (UserError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    whole = optimizer.moments_by_name()
    return [*messages, str(sum(float(moment.abs().sum()) for moment in whole.values()))]


def test_a_state_of_another_model_is_refused_alike_on_all_processes() -> None:
    for moments, state, too_early, changed in run(2, refused):
        assert moments.startswith("UserError") and "lm_head.weight.exp_avg has the shape (9,), not (20, 8)" in moments
        assert state.startswith("UserError") and too_early.startswith("RuntimeError: with several processes")
        assert float(changed) == 0.0


# The parts of a step.


def small_steps(dtype: str, muon: dict[str, Any]) -> dict[str, Any]:
    """Two gradients a step, whoever has them."""
    rank, world_size = collectives.rank(), collectives.world_size()
    parameters = make_parameters(dtype=getattr(torch, dtype))
    optimizer = make_optimizer(parameters, OptimSettings(muon=MuonSettings(**muon)))
    for step in range(4):
        total = [torch.zeros_like(parameter) for parameter in parameters.values()]
        for term in range(rank, 2, world_size):
            set_gradients(parameters, 10 * step + term)
            total = [all_reduce_ + p.grad for all_reduce_, p in zip(total, parameters.values(), strict=True)]
        for gradient, parameter in zip(total, parameters.values(), strict=True):
            parameter.grad = gradient
        optimizer.reduce_gradients()
        optimizer.scale_gradients(0.5 if step % 2 else torch.tensor(0.5))
        optimizer.step()
        optimizer.zero_grad()
    return {"parameters": {name: p.detach() for name, p in parameters.items()}, "moments": optimizer.moments_by_name()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("muon", ["recipe", "nanochat_2026_02", "nanochat_2025_10"])
def test_every_kind_of_parameter_is_updated_as_by_one_process(dtype: str, muon: str) -> None:
    parts = {} if muon == "recipe" else to_plain(compose_train([f"optim={muon}"]).config.optim.muon)
    (one,) = run(1, small_steps, dtype, parts)
    for world_size in (2, 4):
        found = run(world_size, small_steps, dtype, parts)
        assert all(differing(each["parameters"], one["parameters"]) == [] for each in found)
        assert differing(found[0]["moments"], one["moments"]) == []


NORM_SHAPES = {"adamw": [(700, 1000), (37, 24), (5,)], "muon": [(300, 200), (16, 8)]}


def norm_of_large() -> float:
    """Of fixed gradients, of which each process brings a part: in pieces, whole ones and rests, and in shards of 0."""
    generator, groups = torch.Generator().manual_seed(0), []
    for kind, shapes in NORM_SHAPES.items():
        for shape in shapes:
            group = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(3 if kind == "muon" else 1)]
            for i, parameter in enumerate(group):
                gradient = torch.randn(shape, generator=generator)
                parameter.grad = gradient if i % collectives.world_size() == collectives.rank() else 0 * gradient
            groups.append({"kind": kind, "params": group})
    if collectives.world_size() == 1:
        return float(gradient_norm([], groups))
    shards = [
        make_shards(group["kind"], ["any"] * len(group["params"]), group["params"], at_end=number % 2 == 1)
        for number, group in enumerate(groups)
    ]
    for shard in itertools.chain.from_iterable(shards):
        shard.start_reduce().wait()
    return float(gradient_norm(shards, groups))


def test_the_norm_of_large_gradients_has_the_bits_of_one_process() -> None:
    (one,) = run(1, norm_of_large)
    numel = sum(prod(shape) * (3 if kind == "muon" else 1) for kind, of in NORM_SHAPES.items() for shape in of)
    assert one == pytest.approx(numel**0.5, rel=1e-2)
    for world_size in SEVERAL:
        assert run(world_size, norm_of_large) == [one] * world_size


def norm_skip_and_drop() -> dict[str, Any]:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters)

    def snapshot() -> list[Tensor]:
        return [p.detach().clone() for p in parameters.values()] + list(optimizer.moments_by_name().values())

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    set_gradients(parameters, collectives.rank())
    norms = [float(optimizer.reduce_gradients())]
    start = snapshot()
    optimizer.skip_step()
    optimizer.step()
    skipped = same(start, snapshot())
    set_gradients(parameters, collectives.rank())
    norms.append(float(optimizer.reduce_gradients()))
    optimizer.zero_grad()
    try:
        optimizer.step()
    except RuntimeError:
        dropped = same(start, snapshot())
    optimizer.skip_step()  # of a step that is then done again
    set_gradients(parameters, collectives.rank())
    optimizer.reduce_gradients()
    optimizer.step()
    return {"norms": norms, "skipped": skipped, "dropped": dropped, "stepped": not same(start, snapshot())}


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_norm_a_skipped_step_and_dropped_gradients(world_size: int) -> None:
    sums = [torch.zeros(p.shape) for p in make_parameters().values()]
    for rank in range(world_size):
        parameters = make_parameters()
        set_gradients(parameters, rank)
        sums = [total + p.grad for total, p in zip(sums, parameters.values(), strict=True)]
    exact = float(torch.cat([total.double().view(-1) for total in sums]).norm())
    found = run(world_size, norm_skip_and_drop)
    for each in found:
        assert each == found[0] and each["norms"] == pytest.approx([exact] * 2, rel=1e-6)
        assert each["skipped"] and each["dropped"] and each["stepped"]


def missing_gradient(who: int) -> list:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters)
    set_gradients(parameters, 0)
    if collectives.rank() == who:
        parameters["h.1.c_q.weight"].grad = None
    try:
        optimizer.step()
    except RuntimeError as error:
        message = str(error)
    start = make_parameters()
    same = all(torch.equal(parameters[name], start[name]) for name in start)
    kept = parameters["wte.weight"].grad is not None
    whole = optimizer.moments_by_name()
    return [message, same, kept, sum(float(moment.abs().sum()) for moment in whole.values())]


def test_a_gradient_that_one_process_has_not_ends_all_before_anything_changes() -> None:
    first, second, third = run(3, missing_gradient, 1)
    assert "h.1.c_q.weight" in second[0] and "another process" in first[0] and first[0] == third[0]
    assert all(each[1:] == [True, True, 0.0] for each in (first, second, third))


def order_and_sizes() -> dict[str, Any]:
    """The calls to the collectives, and the longest that this process keeps of anything."""
    events: list[str] = []
    before = collectives.start_reduce_scatter, collectives.start_all_gather

    def recorded(what: str, function: Any) -> Any:
        def start(output: Tensor, inputs: Tensor) -> Any:
            events.append(what)
            pending = function(output, inputs)
            wait = pending.wait
            pending.wait = lambda: (events.append("wait"), wait())
            return pending

        return start

    collectives.start_reduce_scatter = recorded("reduce", before[0])
    collectives.start_all_gather = recorded("gather", before[1])
    try:
        net, optimizer = tiny()
        take_steps(net, optimizer, 0, 1, 2)
    finally:
        collectives.start_reduce_scatter, collectives.start_all_gather = before
    kept = sum(m.numel() for shards in optimizer._shards for shard in shards for m in shard.moments.values() if m.ndim)
    first = [shard.end - shard.begin for shards in optimizer._shards for shard in shards]
    return {"events": events, "kept": kept, "elements": sum(first), "by_parameter": len(optimizer.state)}


def test_collectives_overlap_and_nobody_keeps_more_than_a_shard() -> None:
    (one,) = run(1, train, 0, 2)
    net, _ = tiny()
    found = run(2, order_and_sizes)
    for each in found:
        number = each["events"].count("reduce")
        assert each["events"] == ["reduce"] * number + ["wait"] * number + ["gather"] * number + ["wait"] * number
        assert each["by_parameter"] == 0
    whole = sum(moment.numel() for moment in one["moments"].values() if moment.ndim)
    assert sum(each["kept"] for each in found) == whole
    assert sum(each["elements"] for each in found) == sum(parameter.numel() for parameter in net.parameters())
    assert max(each["kept"] for each in found) < 0.6 * whole


@pytest.mark.slow
def test_the_compiled_update_on_two_processes() -> None:
    (one,), found = run(1, train, 3, 2, False, True), run(2, train, 3, 2, False, True)
    assert differing(found[0]["parameters"], found[1]["parameters"]) == []
    for name, parameter in one["parameters"].items():
        torch.testing.assert_close(found[0]["parameters"][name], parameter, rtol=1e-3, atol=1e-4)


def muon_elements() -> int:
    """Of this process's momentum."""
    _, optimizer = tiny()
    return sum(shard.moments["momentum"].numel() for shards in optimizer._shards[-2:] for shard in shards)


def test_with_fewer_matrices_than_processes_the_work_is_spread() -> None:
    """The two stacks of the feed-forward part, three matrices each: not both for the first three of four."""
    counts = run(4, muon_elements)
    assert min(counts) > 0 and max(counts) == 2 * min(counts)


def write_moments(folder: str) -> dict[str, int]:
    """A file of them, and the bytes that were alive at once meanwhile, on each process."""
    net, optimizer = tiny()
    take_steps(net, optimizer, 0, 2, terms=2)  # more are summed in another order
    with AliveBytes() as alive:
        if collectives.is_rank_zero():
            stream = TensorStream(optimizer.moment_shapes(), optimizer.whole_moments())
            save_tensors(Path(folder) / f"{collectives.world_size()}", stream)
        else:
            assert list(optimizer.whole_moments()) == []
    largest = max(prod(shape) for shape in optimizer.moment_shapes().values())
    return {"peak": alive.peak, "largest": 4 * largest}


def test_moments_are_written_one_at_a_time(tmp_path: Path) -> None:
    """By no process more than twice the largest is held besides its shard; the file is that of one process."""
    for world_size in (1, 2, 3):
        for each in run(world_size, write_moments, str(tmp_path)):
            assert each["peak"] <= 2 * each["largest"]
    files = [(tmp_path / str(world_size)).read_bytes() for world_size in (1, 2, 3)]
    assert files[0] == files[1] == files[2]
