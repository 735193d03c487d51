"""Bugs of several processes: what they do each by themselves where they should do it together, or too early."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_pl.distributed import collectives
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.optim.schedules import schedule_values
from tests.helpers.processes import run
from tests.helpers.step_processes import own_share
from tests.helpers.steps import StepLoop


def trained(rows: list[int], nan_in_step: int | None = None, late: bool = False, **settings: Any) -> dict[str, Any]:
    """A step for each number of rows, which the processes share; on one of them nothing is shared.

    Args:
        nan_in_step: the last process's loss is not a number there, and the step is skipped.
        late: collectives read what goes in when they are waited for, and not before.
    """
    loop = StepLoop(device_batch_size=1, **settings)
    rates: list[list[float]] = []
    norms = []
    with late_collectives() if late else nullcontext():
        for step, count in enumerate(rows):
            if step == nan_in_step and collectives.rank() == collectives.world_size() - 1:
                loop.break_gradient(math.nan)
            loop.train_steps(own_share(count))
            loop.after_backward = lambda: None
            rates.append([float(group["lr"]) for group in loop.optimizer.param_groups])
            norms.append(loop.guard.metrics()["train/gradient_norm"])
    return {
        "rates": rates,
        "norms": norms,
        "weights": loop.weights(),
        "moments": loop.optimizer.moments_by_name(),  # on the main process all of them
    }


def largest_difference(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Of any number, relative to the largest one of its tensor."""
    assert some.keys() == others.keys()
    assert all(some[name].shape == others[name].shape for name in some)
    scales = {name: some[name].abs().max().clamp(min=1e-12) for name in some}
    return max(((some[name] - others[name]).abs().max() / scales[name]).item() for name in some)


def equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def test_all_processes_have_the_learning_rate_of_the_step() -> None:
    """A schedule driven by what a process has done itself: fewer rows, none, or a step that only it skipped."""
    rows = [5, 1, 3, 5, 1]
    mine, theirs = run(2, _with_a_skip, rows)
    assert mine["rates"] == theirs["rates"]
    loop = StepLoop()
    first = [group["initial_lr"] for group in loop.optimizer.param_groups]
    multipliers = [schedule_values(loop.schedule, step, loop.num_steps).lr_multiplier for step in range(len(rows))]
    assert len(set(multipliers)) > 2
    assert mine["rates"] == [[lr * multiplier for lr in first] for multiplier in multipliers]
    assert equal(mine["weights"], theirs["weights"])


def _with_a_skip(rows: list[int]) -> dict[str, Any]:
    return trained(rows, nan_in_step=2, on_nonfinite="skip")


def test_the_gradient_of_all_is_clipped_and_not_that_of_each_process() -> None:
    """Each process clipped its own: those with large gradients counted for less, and the logged norm was its own."""
    alone = trained([2, 2], max_grad_norm=0.05)
    mine, theirs = run(2, _clipped, [2, 2])
    assert mine["norms"] == theirs["norms"] == pytest.approx(alone["norms"], rel=1e-5)
    assert min(mine["norms"]) > 0.05, "nothing was clipped"
    assert largest_difference(alone["weights"], mine["weights"]) < 1e-5
    # Updates hardly know how large a gradient is; the moments do.
    assert largest_difference(alone["moments"], mine["moments"]) < 1e-4
    without = trained([2, 2])
    assert largest_difference(alone["moments"], without["moments"]) > 0.1


def _clipped(rows: list[int]) -> dict[str, Any]:
    return trained(rows, max_grad_norm=0.05)


# Elements, matrices in a stack, and a number that none of 2, 3 and 4 divides, in whatever units they are cut.
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "wte.weight": ("wte", (37, 41)),
    "scalars": ("resid_lambda", (7,)),
    "one": ("smear", (1,)),
    **{f"h.{n}.weight": ("matrix", (7, 11)) for n in range(5)},
    **{f"h.{n}.other": ("matrix", (11, 7)) for n in range(7)},
}


def _updated(num_gradients: int) -> dict[str, dict[str, Tensor]]:
    """Parameters and moments after a step, whose gradient is the sum of so many: each process has one, or one all."""
    draw = torch.Generator().manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, (_, shape) in SHAPES.items()}
    roles = {name: role for name, (role, _) in SHAPES.items()}
    optimizer = build_optimizer(parameters.items(), roles, resolve_hyperparameters(OptimSettings(), width=48))
    # Multiples of 1/8: their sum is the same in any order.
    terms = [
        [torch.randint(-8, 9, parameter.shape, generator=draw) / 8 for parameter in parameters.values()]
        for _ in range(num_gradients)
    ]
    own = [terms[collectives.rank()]] if collectives.world_size() > 1 else terms
    for parameter, *gradients in zip(parameters.values(), *own, strict=True):
        parameter.grad = sum(gradients, torch.zeros_like(parameter))
    optimizer.step()
    return {"parameters": {k: v.detach() for k, v in parameters.items()}, "moments": optimizer.moments_by_name()}


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_shapes_need_not_be_divisible_by_the_number_of_processes(world_size: int) -> None:
    """An assertion on the first dimension, or elements behind the last whole part that were never updated."""
    alone, several = _updated(world_size), run(world_size, _updated, world_size)
    # Matrices of odd shapes are multiplied with another rounding where a stack has fewer of them.
    assert largest_difference(alone["moments"], several[0]["moments"]) < 1e-5
    for each in several:
        assert equal(each["parameters"], several[0]["parameters"])
        assert largest_difference(alone["parameters"], each["parameters"]) < 1e-6


class Late:
    """A collective that reads what goes in as late as it may, and keeps no hold of it: the worst of backends."""

    def __init__(self, collective: Callable[..., Any], output: Tensor, inputs: Tensor) -> None:
        self.collective, self.output, self.inputs = collective, output, weakref.ref(inputs)

    def wait(self) -> None:
        inputs = self.inputs()
        assert inputs is not None, "what goes into a collective was freed before it was waited for"
        self.collective(self.output, inputs)


@contextmanager
def late_collectives() -> Iterator[None]:
    """Make those of torch that run beside other work late ones."""
    names = ("reduce_scatter_single", "reduce_scatter_tensor", "all_gather_single", "all_gather_into_tensor")
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}

    def late(collective: Callable[..., Any]) -> Callable[..., Any]:
        return lambda output, inputs, async_op: Late(collective, output, inputs)

    for name, collective in originals.items():
        setattr(dist, name, late(collective))
    try:
        yield
    finally:
        for name, collective in originals.items():
            setattr(dist, name, collective)


def _trained_late(rows: list[int]) -> dict[str, Any]:
    return trained(rows, late=True)


def _given_up_at_once() -> list[Tensor]:
    """What comes of collectives whose inputs nobody else holds."""
    rank, world_size = collectives.rank(), collectives.world_size()
    part, whole = torch.empty(1_000), torch.empty(1_000 * world_size)
    with late_collectives():
        pending = [
            collectives.start_reduce_scatter(part, torch.full((1_000 * world_size,), rank + 1.0)),
            collectives.start_all_gather(whole, torch.full((1_000,), rank + 1.0)),
        ]
        gc.collect()
        torch.full((2_000 * world_size,), math.nan)  # takes their place where they are gone
        for each in pending:
            each.wait()
    return [part, whole]


def test_what_goes_into_a_collective_is_kept_until_it_is_waited_for() -> None:
    """It was freed, or written over, while it was on its way: the processes held other weights, and nothing said so."""
    for part, whole in run(2, _given_up_at_once):
        assert (part == 3).all()
        assert torch.equal(whole, torch.tensor([1.0, 2.0]).repeat_interleave(1_000))
    soon, late = run(2, trained, [5, 4, 5]), run(2, _trained_late, [5, 4, 5])
    for each in (*soon, *late):
        assert equal(each["weights"], soon[0]["weights"])
    assert equal(soon[0]["moments"], late[0]["moments"])
