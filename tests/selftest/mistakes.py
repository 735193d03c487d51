"""Checks on two processes of which one makes a mistake; what each mistake makes the check say, as JSON.

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
from nanochat_pl.selftest import collective_checks
from nanochat_pl.selftest.checks import Setup
from nanochat_pl.selftest.run import run_checks

all_reduce_, broadcast_, scatter, gather, send = (
    collectives.all_reduce_,
    collectives.broadcast_,
    collectives.start_reduce_scatter,
    collectives.start_all_gather,
    collectives.send,
)
all_reduce_sum, broadcast_str, take_steps = (
    collectives.all_reduce_sum,
    collectives.broadcast_str,
    collective_checks.take_steps,
)


def sum_without_own_term(tensor: torch.Tensor) -> None:
    own = tensor.clone()
    all_reduce_(tensor)
    tensor -= own


def broadcast_and_add(tensor: torch.Tensor, source: int = 0) -> None:
    broadcast_(tensor, source)
    tensor += 1


def steps_with_a_flipped_bit(net: Any, *arguments: Any) -> Any:
    result = take_steps(net, *arguments)
    with torch.no_grad():
        weight = next(net.parameters())
        weight[0] = torch.nextafter(weight[0], weight[0] + 1)
    return result


# What process 1 has in the place of what; the line of the table that must fail, and for which processes.
MISTAKES: dict[str, tuple[Any, str, Any, str, str]] = {
    "all_reduce_sum": (
        collectives,
        "all_reduce_sum",
        lambda number: all_reduce_sum(number) + 1,
        "facts of the host",
        "1",
    ),
    "broadcast_str": (collectives, "broadcast_str", lambda text: broadcast_str(text) * 2, "facts of the host", "1"),
    "sum": (collectives, "all_reduce_", sum_without_own_term, "collectives: sum", "1"),
    "broadcast": (collectives, "broadcast_", broadcast_and_add, "collectives: broadcast", "1"),
    "reduce-scatter": (
        collectives,
        "start_reduce_scatter",
        lambda output, inputs: scatter(output, torch.zeros_like(inputs)),
        "collectives: reduce-scatter",
        "01",
    ),
    "all-gather": (
        collectives,
        "start_all_gather",
        lambda output, inputs: gather(output, inputs.roll(1)),
        "collectives: all-gather",
        "01",
    ),
    "send": (
        collectives,
        "send",
        lambda tensor, destination: send(torch.zeros_like(tensor), destination),
        "collectives: send and receive",
        "0",
    ),
    "a flipped bit": (collective_checks, "take_steps", steps_with_a_flipped_bit, "training: same weights", "1"),
}


def main(folder: Path) -> None:
    coordination.begin()
    collective_checks.BYTES_CPU = 2**12
    setup = Setup(torch.device("cpu"), "float32", "cpu", folder, folder, f"version {collectives.rank()}")
    found = {"none": run_checks(collective_checks.CHECKS, setup, 120.0)}
    for name, (owner, attribute, wrong, line, _) in MISTAKES.items():
        right = getattr(owner, attribute)
        check = next(check for check in collective_checks.CHECKS if line.startswith(check.name))
        with mock.patch.object(owner, attribute, wrong if collectives.rank() == 1 else right):
            found[name] = run_checks([check], setup, 120.0)
    if collectives.is_rank_zero():
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    coordination.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
