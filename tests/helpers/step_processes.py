"""Steps of several processes: jobs for tests.helpers.processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.batch import StepBatch
from nanochat_pl.distributed import collectives
from nanochat_pl.distributed.partition import share
from tests.helpers.steps import BATCH, MEMORY, StepLoop, fails


def own_share(rows: int) -> StepBatch:
    """This process's share of the first rows of the batch."""
    own, largest = (share(0, rows, rank, collectives.world_size()) for rank in (collectives.rank(), 0))
    targets = BATCH.targets[own.start : own.stop]
    num_targets = int((targets >= 0).sum())
    inputs = BATCH.inputs[own.start : own.stop]
    return StepBatch(inputs, targets, num_targets, num_rows=len(largest), first_row=own.start)


def steps(rows: int, num_steps: int = 2, **settings: Any) -> dict[str, Any]:
    """Steps without a fault: one process makes the same."""
    loop = StepLoop(**settings)
    results = []
    for _ in range(num_steps):
        results.append(loop.step(own_share(rows)))
        loop.global_step += 1
    return _told(loop) | {"loss": [r.loss for r in results], "norm": [r.gradient_norm for r in results]}


def out_of_memory(where: str, call: int, of: int) -> dict[str, Any]:
    """Memory runs out on process ``of`` alone."""
    loop = StepLoop(2)
    if collectives.rank() == of:
        setattr(loop, where, fails(MEMORY, call))
    losses = [loop.step(own_share(5)).loss]
    loop.global_step += 1
    losses.append(loop.step(own_share(5)).loss)
    return _told(loop) | {"loss": losses}


def out_of_memory_with_one_row() -> dict[str, Any]:
    """Of process 1."""
    loop = StepLoop(1)
    if collectives.rank() == 1:
        loop.before_forward = fails(MEMORY, 1)
    return _refused(loop)


def nan_in_weights() -> dict[str, Any]:
    """Of process 1, in the second step."""
    loop = StepLoop(2)
    loop.step(own_share(5))
    loop.global_step += 1
    if collectives.rank() == 1:
        with torch.no_grad():
            loop.net.smear_lambda.fill_(math.nan)
    return _refused(loop)


def nan_in_a_gradient(dtype: Any = "float32", on_nonfinite: Any = "stop") -> dict[str, Any]:
    """Of process 1; then a good step."""
    loop = StepLoop(2, dtype, on_nonfinite)
    before = loop.weights()
    if collectives.rank() == 1:
        loop.break_gradient()
    if on_nonfinite == "stop" and dtype == "float32":
        return _refused(loop)
    skipped = loop.step(own_share(5)).skipped
    kept = all(torch.equal(weight, before[name]) for name, weight in loop.weights().items())
    loop.after_backward, loop.global_step = lambda: None, 1
    again = loop.step(own_share(5))
    return _told(loop) | {"skipped": [skipped, again.skipped], "kept": kept, "guard": loop.guard.state_dict()}


def _refused(loop: StepLoop) -> dict[str, Any]:
    before = loop.weights()
    try:
        loop.step(own_share(5))
    except UserError as error:
        kept = all(torch.equal(weight, before[name]) for name, weight in loop.weights().items() if name in before)
        return {"kept": kept, "finite": loop.is_finite(), "said": [*error.problems, error.fix]}
    return {"said": []}


def _told(loop: StepLoop) -> dict[str, Any]:
    sums = {name: weight.double().sum().item() for name, weight in loop.weights().items()}
    return {"parts": loop.parts, "device_batch_size": loop.device_batch_size, "weights": sums}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "five rows": lambda: steps(5, device_batch_size=1),
    "documents kept apart": lambda: steps(5, device_batch_size=1, document_start_id=int(BATCH.inputs[0, 3])),
    "one row": lambda: steps(1),
    "one process of two has one micro-batch more": lambda: steps(3, device_batch_size=1),
    "clipped": lambda: steps(5, max_grad_norm=0.3),
    "float16": lambda: steps(5, dtype="float16"),
    "out of memory in forward": lambda: out_of_memory("before_forward", 1, 1),
    "out of memory in backward": lambda: out_of_memory("after_backward", 2, 0),
    "out of memory with one row": out_of_memory_with_one_row,
    "nan in weights": nan_in_weights,
    "nan in a gradient": nan_in_a_gradient,
    "nan in a gradient, skipped": lambda: nan_in_a_gradient(on_nonfinite="skip"),
    "overflow": lambda: nan_in_a_gradient(dtype="float16"),
}


def all_cases() -> dict[str, dict[str, Any]]:
    """What came of each case, one after the other in the same processes."""
    results = {}
    for name, case in CASES.items():
        results[name] = case()
        collectives.barrier()
    return results
