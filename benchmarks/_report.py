"""What benchmarks share: the machine in words, its limits, measuring in turns, medians with their spread, a last line.

The last line of each benchmark is a JSON object: ``benchmark``, ``machine``, ``limits`` (what this machine reached just
now, for a figure says little without), ``n`` (measurements of each kind), and what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanochat_pl.common.wait_policy import wait_policy

os.environ.update(wait_policy(os.environ))  # as the command has it; read when torch is loaded
import torch

from nanochat_pl.common.device import cpu_model, device_name
from nanochat_pl.engine.bench import Spread, as_plain, limits_of

TYPES = (torch.float32, torch.bfloat16)
# Instructions that decide about speed, of all that a processor lists.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
Seconds = tuple[float, float]  # by the clock, and of this process on all processors


def parser_of(doc: str | None, **defaults: int) -> argparse.ArgumentParser:
    """A parser with the benchmark's text and a whole number for each default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="default: %(default)s")
    return parser


def machine_in_words(device: torch.device | None = None) -> str:
    """Processor, its cores and instructions, threads and PyTorch; a GPU first."""
    words = cpu_model().split()
    name = cpu_model().split("; ")[1 if "; " in cpu_model() else 0]
    instructions = [word for word in _INSTRUCTIONS if word in words]
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    gpu = f"{device_name(device)}; " if device is not None and device.type != "cpu" else ""
    return (
        f"{gpu}{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {' '.join(instructions)}{load};"
        f" PyTorch {torch.__version__}"
    )


def limits(device: torch.device | None = None) -> dict[str, Any]:
    """Copies (bytes a second) and products of matrices by type (FLOP a second), measured now."""
    device = device or torch.device("cpu")
    found = {str(dtype).removeprefix("torch."): as_plain(limits_of(device, dtype)) for dtype in TYPES}
    return {
        "copy_bytes_per_second": max(each["bytes_per_second"] for each in found.values()),
        "product_flops_per_second": {dtype: each["flops_per_second"] for dtype, each in found.items()},
    }


def in_turns(n: int, work: Mapping[str, Callable[[], object]]) -> dict[str, list[Seconds]]:
    """Seconds of each, in turns, so that all meet the same machine; a first turn warms up."""
    found: dict[str, list[Seconds]] = {name: [] for name in work}
    for turn in range(n + 1):
        for name in [*work][:: 1 if turn % 2 else -1]:
            begin = time.perf_counter(), time.process_time()
            work[name]()
            if turn:
                found[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least, most and how many."""
    return vars(Spread.of(values))


def spreads(seconds: Mapping[str, Sequence[Seconds]], scale: float = 1e3) -> dict[str, Any]:
    """Of :func:`in_turns`, milliseconds (or what the scale makes of seconds) of each by the clock and on processors."""
    return {
        name: {
            clock: spread([scale * each[which] for each in times])
            for which, clock in enumerate(("clock", "processors"))
        }
        for name, times in seconds.items()
    }


def ratio(seconds: Mapping[str, Sequence[Seconds]], one: str, other: str) -> dict[str, Any]:
    """Time of one over that of the other, turn by turn."""
    pairs = list(zip(seconds[one], seconds[other], strict=True))
    return {
        clock: spread([a[which] / b[which] for a, b in pairs if b[which]])
        for which, clock in enumerate(("clock", "processors"))
    }


def report(benchmark: str, n: int, found: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Print what was found, a line each, and all of it with machine and limits as the last line."""
    for name, value in found.items():
        print(f"{benchmark}: {name}: {_shown(value)}")
    head = {"benchmark": benchmark, "machine": machine_in_words(device), "limits": limits(device), "n": n}
    print(json.dumps({**head, **found}))


def _shown(value: Any) -> str:
    if isinstance(value, Mapping) and set(value) == {"median", "least", "most", "n"}:
        return f"{Spread(**value)}, n={value['n']}"
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_shown(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
