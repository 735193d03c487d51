"""What saving memory saves and costs: the loss in pieces and activation checkpointing, each and both.

    python benchmarks/bench_memory.py [--rounds 5] [--dtype float32] [--compile] [--small]

Peak memory is that of a fresh process: see peak_memory.py. Time is of whole steps, one of each kind in turn, so that
the machine's moods meet all of them; each ratio is within a round. On a CPU it is the process's CPU time, which other
processes disturb least.

The textbook's loss is ``cross_entropy`` of softcapped float32 logits, left to autograd. "Whole" is the project's loss
with all tokens in one piece: gradients are computed in its forward, too, so it is not what plain code would take.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import torch
from peak_memory import Stepper, StepShape, peak_memory

WHOLE = 10**9
BIG = StepShape()
SMALL = StepShape(head_dim=64, sequence_len=256, vocab_size=4096, rows=16)
KINDS = {
    "textbook": {"textbook_loss": True},
    "whole": {"loss_chunk_tokens": WHOLE},
    "in pieces": {},
    "textbook, checkpointing": {"textbook_loss": True, "activation_checkpointing": True},
    "in pieces, checkpointing": {"activation_checkpointing": True},
}


def main(shape: StepShape, rounds: int) -> None:
    """Measure and print a table in Markdown."""
    shapes = {name: dataclasses.replace(shape, **changes) for name, changes in KINDS.items()}
    seconds = step_seconds(list(shapes.values()), rounds)
    how = f"{shape.compute_dtype}, {'compiled' if shape.compile else 'eager'}, {torch.get_num_threads()} threads"
    print(f"depth {shape.depth}, {shape.rows} × {shape.sequence_len} tokens, vocabulary {shape.vocab_size:,}, {how}\n")
    print("| loss | peak above the model | a step | time against the first |\n|---|---|---|---|")
    for (name, kind), times in zip(shapes.items(), seconds, strict=True):
        ratios = [mine / first for mine, first in zip(times, seconds[0], strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, n={rounds})"
        print(f"| {name} | {peak_memory(kind).peak / 1e6:,.0f} MB | {statistics.median(times):.2f} s | {spread} |")


def step_seconds(shapes: list[StepShape], rounds: int) -> list[list[float]]:
    """Seconds of ``rounds`` steps of each shape, all of them in turn; the first step of each is not counted."""
    steppers = [Stepper(shape) for shape in shapes]
    clock = time.perf_counter if shapes[0].device != "cpu" else time.process_time
    seconds: list[list[float]] = [[] for _ in shapes]
    for number in range(rounds + 1):
        for stepper, times in zip(steppers, seconds, strict=True):
            start = clock()
            stepper.step()  # ends with the loss on the host, so a GPU has finished
            if number:
                times.append(clock() - start)
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--small", action="store_true", help="the demo's shape")
    options = parser.parse_args()
    chosen = SMALL if options.small else BIG
    main(dataclasses.replace(chosen, compute_dtype=options.dtype, compile=options.compile), options.rounds)
