"""A ledger and curves as trainings write them, of made-up metrics with known noise."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from nanochat_pl.cli.run_record import flat
from nanochat_pl.common.schema import to_plain
from nanochat_pl.ledger import Entry, append
from nanochat_pl.training.config import TrainConfig

TOKENS_PER_STEP, FLOPS_PER_TOKEN = 4096, 6e6


DEFAULTS = flat(to_plain(TrainConfig()))


def entry_of(run: str, seed: int, bpb: float, changed: dict[str, Any] | None = None, **others: Any) -> Entry:
    stage = others.pop("stage", "base")
    settings = {**DEFAULTS, "seed": seed, "run": run, "stage.name": stage, **(changed or {})}
    told: dict[str, Any] = {
        "git": {"commit": "abc1234def", "dirty": False},
        "data": "rows",
        "tokenizer": "words",
        "machine": {"device": "CPU"},
        "steps": 100,
        "tokens": 100 * TOKENS_PER_STEP,
        "flops": 100 * TOKENS_PER_STEP * FLOPS_PER_TOKEN,
        "seconds": 50.0,
        "exit": "finished",
        "metrics": {"val/bpb": bpb, "val/bpb_stderr": 0.01, "val/loss": 2 * bpb, "chat/mean": 1 / bpb},
    }
    return Entry(
        run, stage, time="2026-11-29T12:00:00+00:00", settings=settings, changed=changed or {}, **(told | others)
    )


def write_curves(folder: Path, bpb: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "train/loss_smoothed", "train/tokens", "train/flops", "train/seconds", "val/bpb"])
        for step in range(1, 101):
            tokens = step * TOKENS_PER_STEP
            loss = 2 * bpb + 5 / step
            measured = bpb + 1 / step - 0.01 if step % 20 == 0 else ""
            writer.writerow([step, loss, tokens, tokens * FLOPS_PER_TOKEN, step * 0.5, measured])


def make_group(
    runs: Path, name: str, values: list[float], changed: dict[str, Any] | None = None, **others: Any
) -> None:
    """Runs NAME-seed0 … with these bits per byte, in the ledger and with curves."""
    for seed, bpb in enumerate(values):
        run = f"{name}-seed{seed}"
        append(runs, entry_of(run, seed, bpb, changed, **others))
        write_curves(runs / run / others.get("stage", "base"), bpb)
