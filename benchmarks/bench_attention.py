"""Attention in a window: the backend that is taken, forward and backward, against one call with a T × T mask.

    python benchmarks/bench_attention.py [--length 2048] [--window 768] [--rounds 15] [--device cpu] [--dtype float32]
        [--all]  (each backend that runs here)

In turns in one process, milliseconds of the clock (on a CPU also of the processors of all threads): medians and ranges
over the rounds. Then what a forward and backward add to the memory of a process (on a GPU: of its allocator), at
lengths that double. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from peak_memory import MALLOC, status
from torch import Tensor

from nanochat_pl.model.attention import BACKENDS, Case, Documents, choose, kernels_of
from nanochat_pl.model.attention.blocks import band_mask
from nanochat_pl.model.attention.varlen import document_ends

HEADS, HEAD_DIM = 4, 64
MASKED = "mask of the whole row"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--window", type=int, default=768)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--memory-of", metavar="BACKEND", help="print the memory that this one takes, and nothing else")
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(memory(arguments, arguments.memory_of)))
        return
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    case = Case(dtype, arguments.window, arguments.length, HEAD_DIM, compiled=device.type == "cuda")
    taken, names = choose(device, case), [MASKED]
    for name, backend in BACKENDS.items():
        reason = backend.cannot(kernels_of(device), case)
        print(f"{name}: {reason or 'runs here'}{', and is taken' if name == taken else ''}")
        names += [name] if name == taken or (arguments.all and not reason) else []
    steps = {name: step_of(name, arguments) for name in names}
    # What keeping documents apart adds to what is taken.
    steps[f"{taken}, documents"] = step_of(taken, arguments, documents=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            times[name].append(milliseconds(step, device))
    for name, found in times.items():
        clock, processor = zip(*found, strict=True)
        print(f"{name}: {shown(clock)} ms" + (f", processors {shown(processor)}" if device.type == "cpu" else ""))
    ratios, of_processor = (
        [one[which] / other[which] for one, other in zip(times[MASKED], times[taken], strict=True)] for which in (0, 1)
    )
    megabytes = {name: in_own_process(arguments, name) for name in (taken, MASKED)}
    for name, sizes in megabytes.items():
        print(f"{name}: {', '.join(f'{size:.0f} MB at {length}' for length, size in sizes.items())}")
    result = {
        "metric": "time of a mask of the whole row over that of the backend that is taken",
        "backend": taken,
        "length": arguments.length,
        "window": arguments.window,
        "device": str(device),
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ratio_of_processor_time": statistics.median(of_processor) if device.type == "cpu" else None,
        "n": len(ratios),
        "milliseconds": {name: statistics.median(clock for clock, _ in found) for name, found in times.items()},
        "memory_mb": megabytes,
    }
    print(json.dumps(result))


def step_of(name: str, arguments: argparse.Namespace, documents: bool = False) -> Callable[[], None]:
    """A forward and backward."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    shape, window = (arguments.rows, arguments.length, HEADS, HEAD_DIM), arguments.window
    q, k, v = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3))
    gradient = torch.randn(shape, device=device, dtype=dtype).transpose(1, 2)
    cuts = None
    if documents:
        numbers = (torch.arange(arguments.length, device=device) // 300).int().expand(arguments.rows, -1)
        cuts = Documents(numbers, document_ends(numbers))
    attend = masked if name == MASKED else BACKENDS[name].attend  # type: ignore[index]
    if name == "flex":
        attend = torch.compile(attend, dynamic=False)

    def step() -> None:
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window, HEAD_DIM**-0.5, cuts)
        torch.autograd.grad(y, (q, k, v), gradient)

    return step


def masked(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, documents: Documents | None) -> Tensor:
    """One call with a mask of T × T."""
    mask = band_mask(q.size(2), k.size(2), 0, window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def milliseconds(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Of the clock, and of the processors."""
    clock, processor = time.perf_counter(), time.process_time()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - clock), 1e3 * (time.process_time() - processor)


def in_own_process(arguments: argparse.Namespace, name: str) -> dict[str, float]:
    command = [sys.executable, __file__, f"--memory-of={name}"]
    command += [f"--{key}={getattr(arguments, key)}" for key in ("length", "window", "rows", "device", "dtype")]
    done = subprocess.run(command, env={**os.environ, **MALLOC}, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def memory(arguments: argparse.Namespace, name: str) -> dict[str, float]:
    """MB that a forward and backward add to what this process holds, by length."""
    device, found = torch.device(arguments.device), {}
    small = argparse.Namespace(**{**vars(arguments), "length": 256, "window": 64})
    step_of(name, small)()  # libraries, and what they keep
    for length in (arguments.length, 2 * arguments.length, 4 * arguments.length):
        step = step_of(name, argparse.Namespace(**{**vars(arguments), "length": length}))
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            step()
            peak = torch.cuda.max_memory_allocated(device)
        else:
            # The high-water mark falls to what is held now.
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            before = status("VmRSS")
            step()
            peak = status("VmHWM")
        found[str(length)] = round((peak - before) / 1e6, 1)
    return found


def shown(times: Sequence[float]) -> str:
    return f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"


if __name__ == "__main__":
    main()
