"""The self-test of two processes of which one makes a mistake; what each mistake makes the checks say, as JSON.

torchrun --nproc-per-node 2 -m tests.selftest.mistakes FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from nanochat_pl.distributed import collectives, coordination
from nanochat_pl.selftest import collective_checks as selftest_processes
from nanochat_pl.selftest.checks import Bench
from nanochat_pl.selftest.run import run_checks
from nanochat_pl.training.checkpoint.io import AtomicCheckpointIO

all_reduce_, scatter, gather, broadcast_, send = (
    collectives.all_reduce_,
    collectives.start_reduce_scatter,
    collectives.start_all_gather,
    collectives.broadcast_,
    collectives.send,
)
total, largest, broadcast_str = collectives.all_reduce_sum, collectives.all_reduce_max, collectives.broadcast_str
take_given_steps, load = selftest_processes.take_given_steps, AtomicCheckpointIO.load_checkpoint


def sum_without_own_term(tensor: torch.Tensor) -> None:
    own = tensor.clone()
    all_reduce_(tensor)
    tensor -= own


def broadcast_and_round(tensor: torch.Tensor, source: int = 0) -> None:
    broadcast_(tensor, source)
    tensor.floor_().clamp_(max=3)


def send_something_else(tensor: torch.Tensor, destination: int) -> None:
    send(torch.zeros_like(tensor), destination)


def steps_with_a_flipped_bit(net: Any, *arguments: Any) -> Any:
    result = take_given_steps(net, *arguments)
    with torch.no_grad():
        weight = next(net.parameters())
        weight[0] = torch.nextafter(weight[0], weight[0] + 1)
    return result


def load_without_a_moment(io: AtomicCheckpointIO, path: Path) -> Any:
    saved = load(io, path)
    for state in saved["optimizer"]["state"].values():
        for name in ("exp_avg", "momentum"):
            if name in state:
                state[name] = torch.zeros_like(state[name])
    return saved


# What is patched, by what, and the lines of the table that must fail: for process 1 alone, or for both.
Mistake = tuple[Any, str, Any, dict[str, str]]
MISTAKES: dict[str, Mistake] = {
    "none": (collectives, "all_reduce_", all_reduce_, {}),
    "another version": (selftest_processes, "_code", lambda: "f" * 12, {"same software": "1"}),
    "total": (collectives, "all_reduce_sum", lambda number: total(number) + 1, {"facts of the host": "1"}),
    "largest": (collectives, "all_reduce_max", lambda number: largest(number) % 2**32, {"facts of the host": "1"}),
    "broadcast_str": (collectives, "broadcast_str", lambda text: broadcast_str(text) * 2, {"facts of the host": "1"}),
    "sum": (collectives, "all_reduce_", sum_without_own_term, {"collectives: sum": "1"}),
    "broadcast": (collectives, "broadcast_", broadcast_and_round, {"collectives: broadcast": "1"}),
    "reduce-scatter": (
        collectives,
        "start_reduce_scatter",
        lambda output, inputs: scatter(output, torch.zeros_like(inputs)),
        {"collectives: reduce-scatter": "01"},
    ),
    "all-gather": (
        collectives,
        "start_all_gather",
        lambda output, inputs: gather(output, inputs.roll(1)),
        {"collectives: all-gather": "01"},
    ),
    "send": (collectives, "send", send_something_else, {"collectives: send and receive": "0"}),
    "a flipped bit": (
        selftest_processes,
        "take_given_steps",
        steps_with_a_flipped_bit,
        {"optimizer: weights of all processes": "1"},
    ),
    "a moment forgotten": (AtomicCheckpointIO, "load_checkpoint", load_without_a_moment, {"resume file": "01"}),
}
# What a mistake in a collective does to the optimizer, where it was the optimizer's.
OPTIMIZER = ("optimizer: norms of summed gradients", f"optimizer: {selftest_processes.NUM_STEPS} updates")


def main(folder: Path) -> None:
    coordination.begin()
    selftest_processes.BYTES_CPU = 2**12
    bench = Bench(torch.device("cpu"), "float32", "cpu", folder, folder)
    found = {}
    with selftest_processes.make_checks() as checks:
        for name, (owner, attribute, wrong, _) in MISTAKES.items():
            right = getattr(owner, attribute)
            with mock.patch.object(owner, attribute, wrong if collectives.rank() == 1 else right):
                found[name] = run_checks(checks, bench, 120.0)
    if collectives.is_rank_zero():
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    coordination.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
