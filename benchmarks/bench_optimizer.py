"""What MuonAdamW takes of a step: the gradients summed, with their norm, and the update. On the CPU, one thread.

    OMP_NUM_THREADS=1 python benchmarks/bench_optimizer.py
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/bench_optimizer.py

Medians and ranges over the rounds of process 0: seconds of the clock, and of its processor (gloo's threads counted in).
Gradients are random: their values have no say in the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from nanochat_pl.distributed import collectives
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim import OptimSettings, build_optimizer, resolve_hyperparameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    collectives.start(torch.device("cpu"))
    config = resolve_model(ModelSettings(depth=arguments.depth), arguments.vocab_size, "float32")
    net = init_weights(GPT(config).materialise(), seed=0)
    hyper = resolve_hyperparameters(OptimSettings(), width=config.width)
    optimizer = build_optimizer(net.named_parameters(), parameter_roles(net), hyper)
    optimizer.allocate_state()
    seconds: dict[str, list[tuple[float, float]]] = {"gradients summed, norm": [], "update": []}
    for _ in range(arguments.rounds + 1):
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
        collectives.barrier()
        seconds["gradients summed, norm"].append(taken(optimizer.reduce_gradients))
        seconds["update"].append(taken(optimizer.step))
        optimizer.zero_grad()
    if collectives.is_rank_zero():
        count = sum(parameter.numel() for parameter in net.parameters())
        print(f"{collectives.world_size()} processes, {count:,} parameters, {arguments.rounds} rounds, milliseconds:")
        for what, both in seconds.items():
            clock, processor = (sorted(1e3 * each for each in times) for times in zip(*both[1:], strict=True))
            print(f"{what}: clock {shown(clock)}, processor {shown(processor)}")
    collectives.stop()


def taken(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock and of this process's processor."""
    clock, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - clock, time.process_time() - processor


def shown(times: list[float]) -> str:
    return f"{statistics.median(times):.1f} ({times[0]:.1f} to {times[-1]:.1f})"


if __name__ == "__main__":
    main()
