"""The checks in which the processes speak to each other: collectives, sharded optimizer, resume file.

What is expected of the optimizer is computed at the same time by one process alone, on the CPU in float32.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nanochat_pl
from nanochat_pl.common.files import ensure_folder
from nanochat_pl.distributed import collectives
from nanochat_pl.model.gpt import GPT
from nanochat_pl.selftest.checks import Bench, Check, Finding, exact, within
from nanochat_pl.training.checkpoint.io import AtomicCheckpointIO
from nanochat_pl.training.tiny_steps import (
    NUM_STEPS,
    Alone,
    distance,
    on_cpu,
    read_alone,
    start_alone,
    take_given_steps,
    take_steps,
    tiny_net,
    tiny_optimizer,
)

# Relative. Losses and norms differ by the order of summation; Polar Express raises small singular values of a gradient,
# and with them its rounding, up to a thousandfold; the first update of Adam has the sign of the gradient.
LOSS_TOLERANCE, NORM_TOLERANCE, UPDATE_TOLERANCE = 1e-4, 1e-3, 1e-2
BYTES_CPU, BYTES_GPU, REPEATS = 2**24, 2**28, 5


def check_software(bench: Bench) -> list[Finding]:
    """The same versions of what the arithmetic depends on everywhere."""
    own = f"nanochat_pl {_code()}, torch {torch.__version__}, Python {platform.python_version()}"
    everyones = collectives.all_gather_str(own)
    wrong = [f"process {rank}: {text}" for rank, text in enumerate(everyones) if text != everyones[0]]
    return [Finding("same software", "FAILED" if wrong and own != everyones[0] else "ok", own, "equal")]


def _code() -> str:
    """What the code of this package is, as twelve digits."""
    digest = hashlib.sha256()
    folder = Path(nanochat_pl.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def check_facts(bench: Bench) -> list[Finding]:
    """Numbers and texts of the host: sum, largest, what the first has, what all have."""
    rank, size = collectives.rank(), collectives.world_size()
    text = f"process {rank} ünd" * (rank + 1)
    answers = {
        "total": collectives.all_reduce_sum(rank + 1) == size * (size + 1) // 2,
        "largest": collectives.all_reduce_max(2**40 + rank) == 2**40 + size - 1,
        "broadcast_str": collectives.broadcast_str(text) == "process 0 ünd",
        "all_gather_str": collectives.all_gather_str(text) == [f"process {n} ünd" * (n + 1) for n in range(size)],
    }
    collectives.barrier()
    begin = time.perf_counter()
    for _ in range(20):
        collectives.all_reduce_max(0)
    micros = (time.perf_counter() - begin) / 20 * 1e6
    wrong = [name for name, right in answers.items() if not right]
    return [exact("facts of the host", wrong, f"{size} process{'es' if size > 1 else ''}, {micros:,.0f} µs each")]


def check_tensors(bench: Bench) -> list[Finding]:
    """Each collective of tensors: the values, then what it moves in a second."""
    size = collectives.world_size()
    if size == 1:
        return [Finding(f"collectives: {name}", "left out", "one process") for name in COLLECTIVES]
    findings = []
    for name, (make, run) in COLLECTIVES.items():
        wrong = []
        for dtype in (torch.float32, torch.bfloat16):
            given, expected = make(12 * size, dtype, bench.device)
            if not torch.equal(run(given), expected):
                wrong.append(f"wrong values in {dtype}")
        rate = _gibibytes_a_second(make, run, bench.device)
        findings.append(exact(f"collectives: {name}", wrong, f"{rate:.2f} GiB/s"))
    return findings


def _values(count: int, rank: int, dtype: torch.dtype, device: torch.device, below: int = 128) -> Tensor:
    """Whole numbers that are exact in any type; no two neighbours are alike."""
    return ((torch.arange(count, device=device) + rank) % below).to(dtype)


def _make_same(count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    last = collectives.world_size() - 1
    return _values(count, collectives.rank(), dtype, device), _values(count, last, dtype, device)


def _broadcast(given: Tensor) -> Tensor:
    collectives.broadcast_(given, source=collectives.world_size() - 1)
    return given


def _make_sum(count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    # Zeros and ones: in bfloat16 their sums are exact up to 256 processes.
    everyones = torch.zeros(count, device=device)
    for rank in range(collectives.world_size()):
        everyones += _values(count, rank, torch.float32, device, below=2)
    return _values(count, collectives.rank(), dtype, device, below=2), everyones.to(dtype)


def _sum(given: Tensor) -> Tensor:
    collectives.all_reduce_(given)
    return given


def _make_scatter(count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    given, everyones = _make_sum(count, dtype, device)
    return given, everyones.chunk(collectives.world_size())[collectives.rank()]


def _reduce_scatter(given: Tensor) -> Tensor:
    output = given.new_empty(len(given) // collectives.world_size())
    collectives.start_reduce_scatter(output, given).wait()
    return output


def _make_gather(count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    size = collectives.world_size()
    parts = [_values(count // size, rank, dtype, device) for rank in range(size)]
    return parts[collectives.rank()], torch.cat(parts)


def _all_gather(given: Tensor) -> Tensor:
    output = given.new_empty(len(given) * collectives.world_size())
    collectives.start_all_gather(output, given).wait()
    return output


def _make_sent(count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    size, own = collectives.world_size(), collectives.rank()
    parts = [_values(count // size, rank, dtype, device) for rank in range(size)]
    return parts[own], torch.cat(parts) if own == 0 else parts[own]


def _send_to_first(given: Tensor) -> Tensor:
    """Each of the others to the first process, one after the other, as moments are gathered for a resume file."""
    if collectives.rank() > 0:
        collectives.send(given, 0)
        return given
    received = [torch.empty_like(given) for _ in range(1, collectives.world_size())]
    for rank, part in enumerate(received, start=1):
        collectives.receive_(part, rank)
    return torch.cat([given, *received])


Make = Callable[[int, torch.dtype, torch.device], tuple[Tensor, Tensor]]
COLLECTIVES: dict[str, tuple[Make, Callable[[Tensor], Tensor]]] = {
    "broadcast": (_make_same, _broadcast),
    "sum": (_make_sum, _sum),
    "reduce-scatter": (_make_scatter, _reduce_scatter),
    "all-gather": (_make_gather, _all_gather),
    "send and receive": (_make_sent, _send_to_first),
}


def _gibibytes_a_second(make: Make, run: Callable[[Tensor], Tensor], device: torch.device) -> float:
    """Size of the whole tensor (float32) over the time it takes, median of a few."""
    num_bytes = BYTES_GPU if device.type == "cuda" else BYTES_CPU
    size = collectives.world_size()
    given, _ = make(num_bytes // 4 // size * size, torch.float32, device)
    seconds = []
    for _ in range(REPEATS + 1):
        _wait_for(device)
        collectives.barrier()
        begin = time.perf_counter()
        run(given)
        _wait_for(device)
        seconds.append(time.perf_counter() - begin)
    return num_bytes / 2**30 / statistics.median(seconds[1:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Together:
    """The checks of the optimizer, which the first process holds against one process on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "alone.safetensors"
        self._alone: Alone | None = None
        self.child = start_alone(collectives.world_size(), self.path) if collectives.is_rank_zero() else None
        stored = importlib.resources.files("nanochat_pl.selftest").joinpath("expected.json")
        self.stored: dict[str, list[float]] = json.loads(stored.read_text(encoding="utf-8"))

    def close(self) -> None:
        """End the process on the CPU, where it still runs."""
        if self.child is not None:
            self.child.kill()
            self.child.wait()

    @property
    def alone(self) -> Alone:
        """What one process found: waited for when it is needed, on the first process."""
        if self._alone is None:
            assert self.child is not None
            self._alone = read_alone(self.child, self.path)
        return self._alone

    def check_optimizer(self, bench: Bench) -> list[Finding]:
        """Updates by given gradients, sharded, against one process with the sum of all gradients."""
        net, rank = tiny_net(bench.device), collectives.rank()
        before = on_cpu(net.parameters())
        norms = take_given_steps(net, tiny_optimizer(net), range(rank, rank + 1), range(NUM_STEPS))
        changes = [new - old for new, old in zip(on_cpu(net.parameters()), before, strict=True)]
        same = _same_weights("optimizer: weights of all processes", net)
        if self.child is None:
            return [same]
        return [
            within("optimizer: norms of summed gradients", _furthest(norms, self.alone.norms), LOSS_TOLERANCE),
            within(f"optimizer: {NUM_STEPS} updates", distance(changes, self.alone.changes), UPDATE_TOLERANCE),
            same,
        ]

    def check_training(self, bench: Bench) -> list[Finding]:
        """A few whole steps of the tiny model against one process on the CPU and against stored figures."""
        net = tiny_net(bench.device)
        steps = take_steps(net)
        stored = [
            within("training: losses, stored", _furthest(steps.losses, self.stored["losses"]), LOSS_TOLERANCE),
            within("training: gradient norms, stored", _furthest(steps.norms, self.stored["norms"]), NORM_TOLERANCE),
            _same_weights("training: weights of all processes", net),
        ]
        if self.child is None:
            return stored
        alone = self.alone.steps
        return [
            *stored,
            within("training: losses", _furthest(steps.losses, alone.losses), LOSS_TOLERANCE),
            within("training: first update", distance(steps.changes, alone.changes), UPDATE_TOLERANCE),
        ]


def _furthest(found: list[float], expected: list[float]) -> float:
    """The largest relative difference; NaN where there is one."""
    differences = [abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True)]
    return max(differences, key=lambda difference: (difference != difference, difference))


def _same_weights(check: str, net: GPT) -> Finding:
    digest = hashlib.sha256()
    for parameter in net.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    everyones = collectives.all_gather_str(digest.hexdigest()[:12])
    wrong = [] if everyones[collectives.rank()] == everyones[0] else ["differ from those of process 0"]
    return exact(check, wrong, everyones[0])


def check_resume_file(bench: Bench) -> list[Finding]:
    """The first process writes a resume file where runs are; all go on from it to the same bits as without it."""
    rank, shares = collectives.rank(), range(collectives.rank(), collectives.rank() + 1)
    net = tiny_net(bench.device)
    optimizer = tiny_optimizer(net)
    take_given_steps(net, optimizer, shares, range(2))
    folder = Path(collectives.broadcast_str(str(_new_folder(bench.runs)) if rank == 0 else ""))
    path = folder / "step=000002.ckpt"
    try:
        optimizer.consolidate_state_dict()
        begin = time.perf_counter()
        if rank == 0:
            saved = {"state_dict": net.state_dict(), "optimizer": optimizer.state_dict()}
            AtomicCheckpointIO().save_checkpoint(saved, path)
        seconds = time.perf_counter() - begin
        collectives.barrier()
        if collectives.all_reduce_max(0 if path.is_file() else 1):
            wrong = [] if path.is_file() else [f"does not see {path}: is the folder the same for all?"]
            return [exact("resume file", wrong, str(path))]
        again = _gone_on_from(path, bench, shares)
        collectives.barrier()
    finally:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    take_given_steps(net, optimizer, shares, range(2, NUM_STEPS))
    wrong = [] if _equal(net, again) else ["other weights after going on"]
    return [exact("resume file", wrong, f"written and verified in {seconds:.2f} s")]


def _new_folder(runs: Path) -> Path:
    return ensure_folder(runs.absolute() / f".selftest.{os.getpid()}.{time.time_ns()}")


def _gone_on_from(path: Path, bench: Bench, shares: range) -> GPT:
    saved: dict[str, Any] = AtomicCheckpointIO().load_checkpoint(path)
    net = tiny_net(bench.device)
    net.load_state_dict(saved["state_dict"])
    optimizer = tiny_optimizer(net)
    optimizer.load_state_dict(saved["optimizer"])
    take_given_steps(net, optimizer, shares, range(2, NUM_STEPS))
    return net


def _equal(one: GPT, other: GPT) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@contextlib.contextmanager
def make_checks() -> Iterator[tuple[Check, ...]]:
    """The checks; while they are made, one process computes on the CPU what some of them expect."""
    with tempfile.TemporaryDirectory(prefix="selftest") as folder:
        together = Together(Path(folder))
        try:
            yield (
                Check("same software", check_software, together=True),
                Check("facts of the host", check_facts, together=True),
                Check("collectives", check_tensors, together=True),
                Check("optimizer", together.check_optimizer, together=True),
                Check("training", together.check_training, together=True),
                Check("resume file", check_resume_file, together=True),
            )
        finally:
            together.close()
