"""Memory that the plan predicts for a training step against what a fresh process measures.

    python benchmarks/bench_plan_memory.py [--full] [--device cuda]

Predicted is ``planning/memory.py``, a formula of the architecture; measured is ``peak_memory.py``. Both are the peak
above the built model, libraries included on a CPU. The sizes differ in depth, row, vocabulary and rows, in the compute
type and in the two knobs; with ``--full`` each phase of a step is the largest one of some of them. Where the hardware
has no bfloat16, its emulation would take minutes a step: all is measured in float32 there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from _report import parser_of, report
from peak_memory import StepShape, peak_memory

from nanochat_pl.common.device import has_bfloat16
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.planning.memory import MemoryKnobs, StepMemory, step_memory

SHAPES = (
    StepShape(rows=2),
    StepShape(rows=2, micro_batches=2),
    StepShape(depth=6, sequence_len=512, vocab_size=2048, rows=8),
    StepShape(depth=8, sequence_len=256, rows=1),
    StepShape(depth=8, sequence_len=1024, vocab_size=8192, rows=4),
    StepShape(depth=8, sequence_len=1024, vocab_size=8192, rows=4, compute_dtype="bfloat16"),
    StepShape(depth=8, sequence_len=1024, vocab_size=8192, rows=8, activation_checkpointing=True),
    StepShape(rows=2, loss_chunk_tokens=4096),
    StepShape(rows=4, loss_chunk_tokens=1024, activation_checkpointing=True, compute_dtype="bfloat16"),
)

TOY = StepShape(depth=2, head_dim=32, aspect_ratio=32, sequence_len=64, vocab_size=512, rows=2)


def predicted(shape: StepShape) -> StepMemory:
    """What the plan says of a shape."""
    settings = ModelSettings(
        depth=shape.depth, aspect_ratio=shape.aspect_ratio, head_dim=shape.head_dim, sequence_len=shape.sequence_len
    )
    assert shape.compute_dtype in ("float32", "bfloat16") and not isinstance(shape.loss_chunk_tokens, str)
    return step_memory(
        resolve_model(settings, shape.vocab_size, shape.compute_dtype),
        shape.rows,
        on_cpu=shape.device == "cpu",
        knobs=MemoryKnobs(shape.activation_checkpointing, shape.loss_chunk_tokens),
        micro_batches=shape.micro_batches,
    )


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="all sizes: two minutes")
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    shapes = [
        dataclasses.replace(shape, device=given.device)
        for shape in ([TOY] if given.toy else SHAPES if given.full else SHAPES[-2:])
    ]
    if not has_bfloat16(torch.device(given.device)):
        shapes = [*dict.fromkeys(dataclasses.replace(shape, compute_dtype="float32") for shape in shapes)]
    for shape in shapes:
        plan, measured = predicted(shape), peak_memory(shape)
        found[describe(shape)] = {
            "largest phase": plan.peak_phase,
            "predicted MiB": round(plan.above_model / 2**20),
            "measured MiB": round(measured.peak / 2**20),
            "ratio": plan.above_model / measured.peak,
        }
    report("plan_memory", 1, found, torch.device(given.device))


def describe(shape: StepShape) -> str:
    """A shape in words."""
    parts = [
        f"depth {shape.depth}, {shape.rows} × {shape.sequence_len:,}, vocabulary {shape.vocab_size:,}",
        shape.compute_dtype,
        "two micro-batches" if shape.micro_batches > 1 else "",
        f"loss in pieces of {shape.loss_chunk_tokens:,}" if shape.loss_chunk_tokens else "",
        "checkpointing" if shape.activation_checkpointing else "",
    ]
    return ", ".join(filter(None, parts))


if __name__ == "__main__":
    main()
