"""A training step by part, beside the rate at which this machine multiplies matrices; also against another checkout.

    python benchmarks/bench_step.py [--shape small|large] [--dtype float32|bfloat16] [--against FOLDER] [--rounds 2]

Each checkout trains in a process of its own, which sets what the training command sets. They make their steps in turns,
one each, so that other work on the machine slows both alike; a round starts all processes anew. Reported: the step and
its parts in milliseconds, tokens a second, the share of the matrix rate that was measured in the same process between
the steps: of each round the median, with their spread over the rounds; of peak memory what was needed at the end.
"times as fast" is of a round's medians, "of single steps" of all pairs of steps.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# depth, sequence length, vocabulary, rows of a step
SHAPES = {"toy": (1, 32, 512, 2), "small": (4, 256, 4096, 16), "large": (6, 512, 8192, 8)}
# Of their matrix products, as model.counts.flops_per_token has it: here, since older checkouts have it elsewhere.
FLOPS_PER_TOKEN = {"toy": 516_312, "small": 27_132_624, "large": 89_654_688}
PARTS = ("forward", "backward", "optimizer", "step")
# They compile, and take from the system the memory that is kept.
WARM_UP_STEPS = 4
HERE = Path(__file__).resolve()


def main() -> None:
    """Measure in processes that take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--against", type=Path, help="another checkout, measured in turns")
    parser.add_argument("--rounds", type=int, default=2, help="how often the processes are started")
    parser.add_argument("--steps", type=int, default=5, help="of each process, after some that warm up")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        train(given.shape, given.dtype, not given.eager)
        return
    checkouts = {"here": HERE.parents[1], **({"against": given.against.resolve()} if given.against else {})}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    times_as_fast: dict[str, list[float]] = {"times as fast": [], "times as fast, of single steps": []}
    for _ in range(given.rounds):
        steps = steps_in_turns(checkouts, given.steps)
        for name, of_process in steps.items():
            medians = {key: statistics.median(step[key] for step in of_process) for key in of_process[0]}
            done = FLOPS_PER_TOKEN[given.shape] * medians["tokens_per_second"] / 1e9
            share, peak = done / medians["matrix_gflops"], of_process[-1]["peak_mb"]
            found[name].append({**medians, "share_of_matrix_rate": share, "peak_mb": peak})
            latest = found[name][-1]
            print(f"step: {name}: {latest['step']:.1f} ms, {latest['share_of_matrix_rate']:.0%} of the matrix rate")
        if given.against:
            pairs = zip(steps["against"], steps["here"], strict=True)
            times_as_fast["times as fast, of single steps"] += [other["step"] / own["step"] for other, own in pairs]
            times_as_fast["times as fast"].append(found["against"][-1]["step"] / found["here"][-1]["step"])
    from _report import report, spread

    result: dict[str, Any] = {"settings": {"shape": given.shape, "dtype": given.dtype}}
    for name, rounds in found.items():
        result[name] = {key: spread([each[key] for each in rounds]) for key in rounds[0]}
    if given.against:
        result |= {what: spread(ratios) for what, ratios in times_as_fast.items()}
    report("step", given.rounds, result)


def steps_in_turns(checkouts: dict[str, Path], num_steps: int) -> dict[str, list[dict[str, float]]]:
    """What each process says of each of its steps; they make them one after the other."""
    with contextlib.ExitStack() as processes:
        started = {}
        for name, root in checkouts.items():  # one after the other: compiling takes both cores
            process = subprocess.Popen(
                [sys.executable, str(HERE), *sys.argv[1:], "--child"],
                env={**os.environ, "PYTHONPATH": str(root / "src")},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            started[name] = processes.enter_context(process)
            _next_line(process)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
        for number in range(num_steps):
            for name in [*started][:: 1 if number % 2 else -1]:
                found[name].append(json.loads(_next_line(started[name], "step\n")))
        return found


def _next_line(process: subprocess.Popen[str], asked: str = "") -> str:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended: said below
        process.stdin.write(asked)
        process.stdin.flush()
    while (line := process.stdout.readline()) and not line.startswith("{"):
        pass  # what libraries print
    if not line:
        raise SystemExit(f"The process ended with exit code {process.wait()}.")
    return line


def train(shape: str, dtype: str, compiled: bool) -> None:
    """Warm up; then a step for each line of standard input, and a line of JSON for each step."""
    _as_the_command_does()
    import torch

    from nanochat_pl.model.config import ModelSettings, resolve_model
    from nanochat_pl.model.gpt import GPT
    from nanochat_pl.model.init import init_weights

    try:
        from nanochat_pl.model.roles import parameter_roles
        from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
        from nanochat_pl.optim.param_groups import build_optimizer
    except ImportError:  # an older checkout
        from nanochat_pl.model.gpt import parameter_roles
        from nanochat_pl.optim import (
            OptimSettings,
            build_optimizer,
            resolve_hyperparameters,
        )

    torch.use_deterministic_algorithms(True)
    # As training does: older checkouts have no such module, or call it at the start.
    keeps_memory = importlib.util.find_spec("nanochat_pl.common.malloc") is not None
    keeps_from_start = keeps_memory and "keep_freed_memory" in _source_of("nanochat_pl.training.device")
    if keeps_from_start:
        _keep_freed_memory()
    if keeps_memory:
        settings: Any = torch.utils.deterministic
        settings.fill_uninitialized_memory = False
    depth, length, vocab_size, rows = SHAPES[shape]
    model = ModelSettings(depth=depth, aspect_ratio=64, head_dim=64, sequence_len=length)
    net = init_weights(GPT(resolve_model(model, vocab_size, compute_dtype=dtype)).materialise(), 0)
    loss = compiled_loss(net) if compiled else net.loss_by_row
    hyperparameters = resolve_hyperparameters(OptimSettings(), width=net.config.width, compute_dtype=dtype)
    optimizer = build_optimizer(net.named_parameters(), parameter_roles(net), hyperparameters)
    optimizer.allocate_state()
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randint(vocab_size, (2, rows, length), generator=generator)

    def step() -> dict[str, float]:
        """One step; milliseconds of its parts."""
        marks = [time.perf_counter()]
        nats = loss(inputs, targets)[0] / inputs.numel()
        marks.append(time.perf_counter())
        nats.backward()
        marks.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.perf_counter())
        between = zip(PARTS, [*marks[:3], marks[0]], [*marks[1:], marks[3]], strict=True)
        return {part: 1e3 * (end - begin) for part, begin, end in between}

    for number in range(WARM_UP_STEPS):
        step()
        if keeps_memory and not keeps_from_start and number == 0:
            _keep_freed_memory()
    print("{}", flush=True)  # ready
    for _ in sys.stdin:
        parts = step()
        measured = {
            **parts,
            "tokens_per_second": inputs.numel() / parts["step"] * 1e3,
            "matrix_gflops": matrix_rate(torch, dtype) / 1e9,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print(json.dumps(measured), flush=True)


def _source_of(module: str) -> str:
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None
    return Path(found.origin).read_text(encoding="utf-8")


def _keep_freed_memory() -> None:
    from nanochat_pl.common.malloc import keep_freed_memory

    keep_freed_memory()


def compiled_loss(net: Any) -> Any:
    """The loss as this checkout's training compiles it."""
    try:
        from nanochat_pl.model.compiled import CompiledLoss
    except ImportError:
        import torch

        return torch.compile(net.loss_by_row, dynamic=False)
    return CompiledLoss(net)


def matrix_rate(torch: Any, dtype: str) -> float:
    """FLOP/s of large products, the best of some."""
    square = torch.ones(1536, 1536, dtype=getattr(torch, dtype))
    best = 1e9
    for _ in range(3):
        begin = time.perf_counter()
        square @ square
        best = min(best, time.perf_counter() - begin)
    return 2 * 1536**3 / best


def _as_the_command_does() -> None:
    """How threads wait, in the environment before torch is loaded."""
    try:
        from nanochat_pl.common.wait_policy import wait_policy
    except ImportError:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    else:
        os.environ.update(wait_policy(os.environ))


if __name__ == "__main__":
    main()
