"""The checks in which the processes speak to each other: software, collectives, training steps, resume file."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nanochat_pl.common.files import ensure_folder
from nanochat_pl.distributed import collectives
from nanochat_pl.model.gpt import GPT
from nanochat_pl.optim.muon_adamw import MuonAdamW
from nanochat_pl.selftest.checks import Check, Finding, Setup, exact, within
from nanochat_pl.training.checkpoint.io import AtomicCheckpointIO
from nanochat_pl.training.tiny_steps import NUM_STEPS, take_steps, tiny_net, tiny_optimizer

# Relative. Losses and norms differ by the order of summation; Polar Express raises small singular values of a gradient,
# and with them its rounding, up to a thousandfold.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-4, 1e-3
BYTES_CPU, BYTES_GPU, REPEATS = 2**24, 2**28, 5


def check_software(setup: Setup) -> list[Finding]:
    """The same versions and the same source everywhere."""
    differs = setup.software != collectives.all_gather_str(setup.software)[0]
    return [Finding("same software", "FAILED" if differs else "ok", setup.software, "equal")]


def check_host_collectives(setup: Setup) -> list[Finding]:
    """Numbers and texts of the host: sum, largest, what the first has, what all have."""
    rank, size = collectives.rank(), collectives.world_size()
    text = f"process {rank} ünd" * (rank + 1)
    answers = {
        "all_reduce_sum": collectives.all_reduce_sum(rank + 1) == size * (size + 1) // 2,
        "all_reduce_max": collectives.all_reduce_max(2**40 + rank) == 2**40 + size - 1,
        "broadcast_str": collectives.broadcast_str(text) == "process 0 ünd",
        "all_gather_str": collectives.all_gather_str(text) == [f"process {n} ünd" * (n + 1) for n in range(size)],
    }
    begin = time.perf_counter()
    for _ in range(20):
        collectives.all_reduce_max(0)
    micros = (time.perf_counter() - begin) / 20 * 1e6
    wrong = [name for name, right in answers.items() if not right]
    return [exact("facts of the host", wrong, f"{size} process{'es' if size > 1 else ''}, {micros:,.0f} µs each")]


def _broadcast(own: Tensor) -> Tensor:
    collectives.broadcast_(own, source=collectives.world_size() - 1)
    return own


def _sum(own: Tensor) -> Tensor:
    collectives.all_reduce_(own)
    return own


def _part(whole: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return whole.chunk(collectives.world_size())[collectives.rank()]


def _reduce_scatter(own: Tensor) -> Tensor:
    output = torch.empty_like(_part(own))
    collectives.start_reduce_scatter(output, own).wait()
    return output


def _all_gather(own: Tensor) -> Tensor:
    output = torch.empty_like(own)
    collectives.start_all_gather(output, _part(own)).wait()
    return output


def _send_to_first(own: Tensor) -> Tensor:
    """Each of the others to the first process, one after the other, as moments are gathered for a resume file."""
    if collectives.rank() > 0:
        collectives.send(_part(own), 0)
        return own
    for rank, part in enumerate(own.chunk(collectives.world_size())):
        if rank > 0:
            collectives.receive_(part, rank)
    return own


def _parts_of(everyones: list[Tensor]) -> Tensor:
    """Of each process's tensor its own part, put together."""
    return torch.cat([each.chunk(len(everyones))[rank] for rank, each in enumerate(everyones)])


# What is done with this process's tensor, and what has to come of it, given the tensors of all.
COLLECTIVES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[list[Tensor]], Tensor]]] = {
    "broadcast": (_broadcast, lambda everyones: everyones[-1]),
    "sum": (_sum, lambda everyones: torch.stack(everyones).sum(0)),
    "reduce-scatter": (_reduce_scatter, lambda everyones: _part(torch.stack(everyones).sum(0))),
    "all-gather": (_all_gather, _parts_of),
    "send and receive": (
        _send_to_first,
        lambda everyones: everyones[rank] if (rank := collectives.rank()) else _parts_of(everyones),
    ),
}


def check_collectives(setup: Setup) -> list[Finding]:
    """Each collective of tensors: the values, then what it moves in a second."""
    size = collectives.world_size()
    if size == 1:
        return [Finding(f"collectives: {name}", "left out", "one process") for name in COLLECTIVES]
    findings = []
    for name, (run, expected) in COLLECTIVES.items():
        wrong = []
        for dtype in (torch.float32, torch.bfloat16):
            everyones = [_numbers(12 * size, rank).to(setup.device, dtype) for rank in range(size)]
            if not torch.equal(run(everyones[collectives.rank()].clone()), expected(everyones)):
                wrong.append(f"wrong values in {dtype}")
        rate = _gibibytes_per_second(run, setup.device)
        findings.append(exact(f"collectives: {name}", wrong, f"{rate:.2f} GiB/s"))
    return findings


def _numbers(count: int, rank: int) -> Tensor:
    """0, 1 and 2, no two neighbours alike: in bfloat16 their sums are exact up to 128 processes."""
    return (torch.arange(count) + rank) % 3


def _gibibytes_per_second(run: Callable[[Tensor], Tensor], device: torch.device) -> float:
    """Size of the whole tensor (float32) over the time it takes, median of a few."""
    num_bytes = BYTES_GPU if device.type == "cuda" else BYTES_CPU
    size = collectives.world_size()
    tensor = torch.zeros(num_bytes // 4 // size * size, device=device)
    seconds = []
    for _ in range(REPEATS + 1):
        _wait_for(device)
        collectives.barrier()
        begin = time.perf_counter()
        run(tensor)
        _wait_for(device)
        seconds.append(time.perf_counter() - begin)
    return num_bytes / 2**30 / statistics.median(seconds[1:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_training(setup: Setup) -> list[Finding]:
    """A few steps of the tiny model on all processes together, against the stored metrics of a plain implementation."""
    stored = json.loads(importlib.resources.files(__package__).joinpath("expected.json").read_text(encoding="utf-8"))
    net = tiny_net(setup.device)
    losses, norms = take_steps(net, tiny_optimizer(net), range(NUM_STEPS))
    digest = hashlib.sha256(b"".join(parameter.detach().cpu().numpy().tobytes() for parameter in net.parameters()))
    own = digest.hexdigest()[:12]
    first = collectives.all_gather_str(own)[0]
    shown = ": " + ", ".join(f"{loss:.4f}" for loss in losses)
    return [
        within(f"training: losses of {NUM_STEPS} steps", _furthest(losses, stored["losses"]), LOSS_TOLERANCE, shown),
        within("training: gradient norms", _furthest(norms, stored["norms"]), NORM_TOLERANCE),
        exact("training: same weights", [] if own == first else ["differ from those of process 0"], own),
    ]


def _furthest(found: list[float], expected: list[float]) -> float:
    """The largest relative difference; NaN where there is one."""
    differences = [abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True)]
    return max(differences, key=lambda difference: (difference != difference, difference))


def check_resume_file(setup: Setup) -> list[Finding]:
    """The first process writes a resume file where runs are; all go on from it to the same bits as without it."""
    is_first = collectives.is_rank_zero()
    net = tiny_net(setup.device)
    optimizer = tiny_optimizer(net)
    take_steps(net, optimizer, range(2))
    name = f".selftest.{os.getpid()}.{time.time_ns()}"
    folder = Path(collectives.broadcast_str(str(ensure_folder(setup.runs.absolute() / name)) if is_first else ""))
    path = folder / "step=000002.ckpt"
    try:
        optimizer.consolidate_state_dict()
        begin = time.perf_counter()
        if is_first:
            saved = {"state_dict": net.state_dict(), "optimizer": optimizer.state_dict()}
            AtomicCheckpointIO().save_checkpoint(saved, path)
        seconds = time.perf_counter() - begin
        collectives.barrier()
        if collectives.all_reduce_max(not path.is_file()):
            wrong = [] if path.is_file() else [f"does not see {path}: is the folder the same for all?"]
            return [exact("resume file", wrong, str(path))]
        resumed, resumed_optimizer = _load(path, setup.device)
        collectives.barrier()
    finally:
        if is_first:
            shutil.rmtree(folder, ignore_errors=True)
    for model, its_optimizer in ((net, optimizer), (resumed, resumed_optimizer)):
        take_steps(model, its_optimizer, range(2, NUM_STEPS))
    pairs = zip(net.parameters(), resumed.parameters(), strict=True)
    wrong = [] if all(torch.equal(one, other) for one, other in pairs) else ["other weights after going on"]
    return [exact("resume file", wrong, f"written and verified in {seconds:.2f} s")]


def _load(path: Path, device: torch.device) -> tuple[GPT, MuonAdamW]:
    saved = AtomicCheckpointIO().load_checkpoint(path)
    net = tiny_net(device)
    net.load_state_dict(saved["state_dict"])
    optimizer = tiny_optimizer(net)
    optimizer.load_state_dict(saved["optimizer"])
    return net, optimizer


CHECKS = (
    Check("same software", check_software, True),
    Check("facts of the host", check_host_collectives, True),
    Check("collectives", check_collectives, True),
    Check("training", check_training, True),
    Check("resume file", check_resume_file, True),
)
