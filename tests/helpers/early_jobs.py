"""Steps of several processes that begin to sum gradients in the backward: jobs for tests.helpers.processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_pl.distributed import collectives
from tests.helpers.small_optim import make_optimizer, make_parameters, set_gradients
from tests.helpers.step_processes import own_share
from tests.helpers.steps import MEMORY, StepLoop, fails

ROWS, NUM_STEPS = 7, 4  # of process 0 two micro-batches of two rows, of process 1 one with a row and one filled up


class WatchedLoop(StepLoop):
    """Says of each sum whether it began in a backward.

    Attributes:
        begun: for each sum whether it was in a backward, and its number of elements.
    """

    def __init__(self, early: bool) -> None:
        super().__init__(2, on_nonfinite="skip")
        self.optimizer.overlaps_backward = early
        self.begun: list[tuple[bool, int]] = []
        self._is_in_backward = False

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self._is_in_backward = True
        try:
            super().manual_backward(loss)
        finally:
            self._is_in_backward = False

    def step(self, batch: Any) -> Any:
        start = collectives.start_reduce_scatter

        def watched(output: Tensor, inputs: Tensor) -> Any:
            self.begun.append((self._is_in_backward, inputs.numel()))
            return start(output, inputs)

        collectives.start_reduce_scatter = watched
        try:
            return super().step(batch)
        finally:
            collectives.start_reduce_scatter = start


def _plain(loop: WatchedLoop, step: int, folder: Path) -> WatchedLoop:
    return loop


def _skipped(loop: WatchedLoop, step: int, folder: Path) -> WatchedLoop:
    """A gradient of process 1 is infinite in the third step."""
    if step == 2 and collectives.rank() == 1:
        weight = loop.net.lm_head.weight
        handle = weight.register_hook(lambda gradient: gradient.fill_(math.inf))
        loop.after_backward = handle.remove
    return loop


def _out_of_memory(call: int, where: str) -> Any:
    """In the third step of process 1: before a forward, or in the middle of a backward."""

    def before(loop: WatchedLoop, step: int, folder: Path) -> WatchedLoop:
        if step == 2 and collectives.rank() == 1:
            if where == "forward":
                loop.before_forward = fails(MEMORY, call)
            else:
                loop.net.blocks[1].mlp.c_fc.weight.register_hook(fails(MEMORY, call))
        return loop

    return before


def _resumed(loop: WatchedLoop, step: int, folder: Path) -> WatchedLoop:
    """A new optimizer goes on from the third step with what the old one had."""
    if step != 2:
        return loop
    moments, path = loop.optimizer.moments_by_name(), folder / f"{loop.optimizer.overlaps_backward}.pt"
    if collectives.is_rank_zero():
        torch.save({"weights": loop.weights(), "moments": moments}, path)
    collectives.barrier()
    saved = torch.load(path, weights_only=True)
    new = WatchedLoop(loop.optimizer.overlaps_backward)
    new.net.load_state_dict(saved["weights"])
    new.optimizer.load_moments(saved["moments"])
    new.begun, new.global_step = loop.begun, loop.global_step
    return new


CASES: dict[str, Any] = {
    "plain": _plain,
    "skipped": _skipped,
    "out of memory in the first forward": _out_of_memory(1, "forward"),
    "out of memory in the last forward": _out_of_memory(2, "forward"),
    "out of memory in the last backward": _out_of_memory(2, "backward"),
    "resumed": _resumed,
}


def cases(folder: str) -> dict[str, dict[str, dict[str, Any]]]:
    """What came of each case, by whether sums began in the backward (``early``) or not (``late``)."""
    return {
        name: {kind: _steps(kind == "early", before, Path(folder)) for kind in ("early", "late")}
        for name, before in CASES.items()
    }


def _steps(early: bool, before: Any, folder: Path) -> dict[str, Any]:
    loop, results, sums = WatchedLoop(early), [], []
    for step in range(NUM_STEPS):
        loop = before(loop, step, folder)
        first = len(loop.begun)
        results.append(loop.step(own_share(ROWS)))
        sums.append([list(each) for each in loop.begun[first:]])
        loop.global_step += 1
    return {
        "weights": loop.weights(),
        "moments": loop.optimizer.moments_by_name(),
        "norms": [each.gradient_norm for each in results],
        "losses": [each.loss for each in results],
        "skipped": [each.skipped for each in results],
        "rows": loop.device_batch_size,
        "sums": sums,
        "shards": sum(len(shards) for shards in loop.optimizer._shards),
    }


def missing_gradient() -> list[Any]:
    """Process 1 has no gradient of one parameter, after a step in which it had."""
    parameters = make_parameters()
    optimizer = make_optimizer(parameters)
    optimizer.overlaps_backward = True
    with optimizer.reducing():
        set_gradients(parameters, 0)
    optimizer.reduce_gradients()
    optimizer.step()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with optimizer.reducing():
        set_gradients(parameters, 1)
        if collectives.rank() == 1:
            parameters["h.1.c_q.weight"].grad = None
    try:
        optimizer.reduce_gradients()
    except RuntimeError as error:
        kept = all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())
        return [str(error), kept, collectives.all_reduce_sum(1)]
    return []
