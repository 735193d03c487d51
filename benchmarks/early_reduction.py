"""Steps of two processes whose gradients are summed in the last backward, against steps that sum them after it.

Both kinds alternate in the same processes, one thread each, so the machine's moods meet both; a ratio is of two steps
that follow each other, by the wall clock and by the CPU time of both processes together. Also printed: the share of the
gradients' bytes that are complete while at least a tenth of the time between the first and the last gradient is left.
A choice that was made once, so `make bench` does not measure it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from _report import report, spread
from torch import Tensor

from nanochat_pl.distributed import collectives
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.param_groups import build_optimizer

WARM_UP_STEPS = 4


def measure(num_pairs: int, depth: int, vocab_size: int, rows: int, micro_batches: int) -> None:
    """In each process: steps of both kinds; process 0 prints."""
    torch.set_num_threads(1)
    collectives.start(torch.device("cpu"))
    settings = ModelSettings(depth=depth, aspect_ratio=64, head_dim=64, sequence_len=256)
    config = resolve_model(settings, vocab_size, "float32")
    net = init_weights(GPT(config).materialise(), seed=1)
    hyper = resolve_hyperparameters(OptimSettings(), width=config.width)
    optimizer = build_optimizer(net.named_parameters(), parameter_roles(net), hyper)
    optimizer.allocate_state()
    ids = torch.randint(vocab_size, (rows, 257), generator=torch.Generator().manual_seed(collectives.rank()))

    def backward() -> None:
        (net.weighted_loss(ids[:, :-1], ids[:, 1:].contiguous()) / ids.numel()).backward()

    def step(early: bool) -> tuple[float, float, float]:
        """Seconds, CPU seconds of both processes, seconds waited."""
        optimizer.overlaps_backward = early
        collectives.barrier()
        begin, cpu, waited = time.perf_counter(), time.process_time(), collectives.seconds_waited()
        for part in range(micro_batches):
            with optimizer.reducing(in_backward=part == micro_batches - 1):
                backward()
        optimizer.reduce_gradients()
        optimizer.step()
        optimizer.zero_grad()
        collectives.barrier()
        wall, waits = time.perf_counter() - begin, collectives.seconds_waited() - waited
        return wall, collectives.all_reduce_sum(int(1e9 * (time.process_time() - cpu))) / 1e9, waits

    for number in range(WARM_UP_STEPS):
        step(early=number % 2 == 0)
    pairs = [
        [step(early=early) for early in ((True, False) if number % 2 else (False, True))] for number in range(num_pairs)
    ]
    pairs = [pair[::-1] if number % 2 else pair for number, pair in enumerate(pairs)]  # now: after, early
    share = early_share(net, backward)
    if collectives.is_rank_zero():
        found: dict[str, Any] = {"gradient bytes complete while a tenth of the backward is left": share}
        for column, name in enumerate(("wall clock", "CPU time", "seconds waited")):
            after, early = ([pair[kind][column] for pair in pairs] for kind in (0, 1))
            ratios = [b / a for a, b in zip(after, early, strict=True) if a]
            found |= {f"{name}, in the backward over after it": spread(ratios), f"{name}, after it": spread(after)}
        report("early_reduction", num_pairs, found)
    collectives.stop()


def early_share(net: GPT, backward: Callable[[], None]) -> float:
    """Share of the gradients' bytes that are complete after nine tenths of the time from first to last gradient."""
    times: list[tuple[float, int]] = []

    def note(parameter: Tensor) -> None:
        times.append((time.perf_counter(), parameter.nbytes))

    handles = [parameter.register_post_accumulate_grad_hook(note) for parameter in net.parameters()]
    backward()
    for handle in handles:
        handle.remove()
    begin, end = times[0][0], times[-1][0]
    limit = begin + 0.9 * (end - begin)
    return sum(size for when, size in times if when < limit) / sum(size for _, size in times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=1)
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options.pairs, options.depth, options.vocab, options.rows, options.micro_batches)
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *sys.argv]
        sys.exit(subprocess.run(torchrun, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)
