"""The compiled loss part by part (what trains) against one graph of all layers: steps, and the wait before the first.

Steps: two twins of a model in one process, turn by turn, so the machine's moods meet both; CPU time of all threads,
since a compiler's worth is not how busy the machine is. First steps: a fresh process each, with an empty cache of the
compiler and again with the one that it left; CPU time of it and of the compilers that it starts. A choice that was made
once, so `make bench` does not measure it.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from _report import in_turns, parser_of, ratio, report, spreads

from nanochat_pl.common.device import choose_compute_dtype
from nanochat_pl.model.compiled import CompiledLoss
from nanochat_pl.model.config import GPTConfig, ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.param_groups import build_optimizer

WAYS: dict[str, Callable[[GPT], Callable[..., tuple[torch.Tensor, torch.Tensor]]]] = {
    "one graph": lambda net: torch.compile(net.loss_by_row, dynamic=False),
    "parts": CompiledLoss,
}


class Steps:
    """A model that is trained on the same row again and again."""

    def __init__(self, config: GPTConfig, way: str, rows: int) -> None:
        self.net = init_weights(GPT(config).materialise())
        self.loss = WAYS[way](self.net)
        hyper = resolve_hyperparameters(OptimSettings(), width=config.width, compute_dtype=config.compute_dtype)
        self.optimizer = build_optimizer(self.net.named_parameters(), parameter_roles(self.net), hyper)
        self.ids = torch.randint(
            config.vocab_size, (rows, config.sequence_len + 1), generator=torch.Generator().manual_seed(0)
        )

    def seconds(self) -> float:
        """Of one step: CPU time."""
        start = time.process_time()
        nats, _ = self.loss(self.ids[:, :-1].contiguous(), self.ids[:, 1:].contiguous())
        (nats / self.ids[:, 1:].numel()).backward()
        self.optimizer.reduce_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start


def steps(dtype: str, depth: int, pairs: int) -> dict[str, Any]:
    """The CPU milliseconds of a step either way, and their ratio."""
    settings = ModelSettings(depth=depth, head_dim=64, sequence_len=256)
    config = resolve_model(settings, 4096, dtype)  # type: ignore[arg-type]
    ways = {way: Steps(config, way, rows=16) for way in WAYS}
    for each in [*ways.values()] * 3:
        each.seconds()
    times = in_turns(pairs, {way: each.seconds for way, each in ways.items()})
    return {"milliseconds of a step": spreads(times), "parts / one graph": ratio(times, "parts", "one graph")}


def first_step(way: str, depth: int) -> None:
    """Print the seconds of the first step of a deep, narrow model: in a process of its own."""
    settings = ModelSettings(depth=depth, aspect_ratio=4, head_dim=16, sequence_len=256, short_window_multiple=16)
    config = resolve_model(settings, 512, choose_compute_dtype("auto", torch.device("cpu")))
    each = Steps(config, way, rows=2)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = each.seconds()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{seconds + after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime:.1f}")


def waits(way: str, depth: int) -> dict[str, float]:
    """Seconds of the first step with an empty cache of the compiler and with a full one."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--first", way, "--depths", str(depth)]
        # One process compiles, so that all of it is counted.
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        return {
            kind: float(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
            for kind in ("empty", "full")
        }


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__, pairs=4, depth=2)
    trained_in = choose_compute_dtype("auto", torch.device("cpu"))
    parser.add_argument("--dtypes", nargs="*", default=[trained_in], help="default: what is trained in here")
    parser.add_argument("--depths", type=int, nargs="*", default=[], help="of first steps, as 12: minutes")
    parser.add_argument("--first", choices=[*WAYS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first:
        first_step(options.first, options.depths[0])
        return
    found: dict[str, Any] = {dtype: steps(dtype, options.depth, options.pairs) for dtype in options.dtypes}
    for depth in options.depths:
        found[f"first step at depth {depth}, CPU seconds by cache"] = {way: waits(way, depth) for way in WAYS}
    report("compiled_parts", options.pairs, found)


if __name__ == "__main__":
    main()
