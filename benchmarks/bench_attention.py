"""Attention in a window: the backend that is taken, forward and backward, against one call with a T × T mask.

    python benchmarks/bench_attention.py [--length 2048] [--window 768] [--rounds 5] [--device cpu] [--dtype float32]
        [--all]  (each backend that runs here)

In turns in one process. Then what a forward and backward add to the memory of a process (on a GPU: of its allocator),
at lengths that double.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _report import in_turns, parser_of, ratio, report, spreads
from peak_memory import MALLOC, status
from torch import Tensor

from nanochat_pl.model.attention import BACKENDS, Case, Documents, choose, kernels_of
from nanochat_pl.model.attention.blocks import band_mask
from nanochat_pl.model.attention.varlen import document_ends

HEADS, HEAD_DIM = 4, 64
MASKED = "mask of the whole row"


def main() -> None:
    parser = parser_of(__doc__, length=2048, window=768, rows=2, rounds=5)
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
    taken, names, said = choose(device, case), [MASKED], {}
    for name, backend in BACKENDS.items():
        reason = backend.cannot(kernels_of(device), case)
        said[name] = f"{reason or 'runs here'}{', and is taken' if name == taken else ''}"
        names += [name] if name == taken or (arguments.all and not reason) else []
    steps = {name: step_of(name, arguments) for name in names}
    # What keeping documents apart adds to what is taken.
    steps[f"{taken}, documents"] = step_of(taken, arguments, documents=True)
    times = in_turns(arguments.rounds, steps)
    settings = {key: getattr(arguments, key) for key in ("length", "window", "rows", "device", "dtype")}
    found = {
        "settings": settings,
        "backends": said,
        "time of a mask of the whole row over that of what is taken": ratio(times, MASKED, taken),
        "milliseconds": spreads(times),
        "memory in MB, by length": {name: in_own_process(arguments, name) for name in (taken, MASKED)},
    }
    report("attention", arguments.rounds, found, device)


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
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def masked(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, documents: Documents | None) -> Tensor:
    """One call with a mask of T × T."""
    mask = band_mask(q.size(2), k.size(2), 0, window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


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


if __name__ == "__main__":
    main()
