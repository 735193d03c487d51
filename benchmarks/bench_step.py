"""A training step by part, beside the rate at which this machine multiplies matrices; also against another checkout.

    python benchmarks/bench_step.py [--shape small|large] [--dtype float32|bfloat16] [--against FOLDER] [--rounds 2]

Each measurement is a process of its own, checkouts in turns, and sets what the training command sets: the step and its
parts in milliseconds, tokens a second, the share of the matrix rate that was measured in the same process, peak memory.
"""

from __future__ import annotations

import argparse
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
HERE = Path(__file__).resolve()


def main() -> None:
    """Measure in processes, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--against", type=Path, help="another checkout, measured in turns")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each checkout")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.shape, given.dtype, given.steps, not given.eager)))
        return
    checkouts = {"here": HERE.parents[1], **({"against": given.against.resolve()} if given.against else {})}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for _ in range(given.rounds):
        for name, root in checkouts.items():
            found[name].append(in_process(root, sys.argv[1:]))
            latest = found[name][-1]
            print(f"step: {name}: {latest['step']:.1f} ms, {latest['share_of_matrix_rate']:.0%} of the matrix rate")
    from _report import report, spread

    medians = {
        name: {key: spread([each[key] for each in all_of]) for key in all_of[0]} for name, all_of in found.items()
    }
    result: dict[str, Any] = {"settings": {"shape": given.shape, "dtype": given.dtype}, **medians}
    if given.against:
        pairs = zip(found["against"], found["here"], strict=True)
        result["times as fast"] = spread([other["step"] / own["step"] for other, own in pairs])
    report("step", given.rounds, result)


def in_process(root: Path, arguments: list[str]) -> dict[str, Any]:
    """Measure a checkout's code in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    command = [sys.executable, str(HERE), *arguments, "--child"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape: str, dtype: str, num_steps: int, compiled: bool) -> dict[str, float]:
    """Medians in ms of a step's parts, and what follows from them."""
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
        from nanochat_pl.model.gpt import parameter_roles  # type: ignore[attr-defined,no-redef]
        from nanochat_pl.optim import (  # type: ignore[attr-defined,no-redef]
            OptimSettings,
            build_optimizer,
            resolve_hyperparameters,
        )

    torch.use_deterministic_algorithms(True)
    # As training does, where this checkout's training does: an older one has no such module.
    keeps_memory = importlib.util.find_spec("nanochat_pl.common.malloc") is not None
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
    times: dict[str, list[float]] = {part: [] for part in PARTS}
    for number in range(num_steps + 4):
        marks = [time.perf_counter()]
        nats = loss(inputs, targets)[0] / inputs.numel()
        marks.append(time.perf_counter())
        nats.backward()
        marks.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.perf_counter())
        if keeps_memory and number == 0:
            from nanochat_pl.common.malloc import keep_freed_memory

            keep_freed_memory()
        if number >= 4:  # the first ones compile and warm up
            for part, begin, end in zip(PARTS, [*marks[:3], marks[0]], [*marks[1:], marks[3]], strict=True):
                times[part].append(1e3 * (end - begin))
    result = {part: statistics.median(values) for part, values in times.items()}
    rate, done = matrix_rate(torch, dtype), FLOPS_PER_TOKEN[shape] * inputs.numel() / result["step"] * 1e3
    return {
        **result,
        "tokens_per_second": inputs.numel() / result["step"] * 1e3,
        "matrix_gflops": rate / 1e9,
        "share_of_matrix_rate": done / rate,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


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
    for _ in range(5):
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
