"""One tiny run with all stages, and a ledger beside it, for all notebooks."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.ledger import Entry, append
from tests.helpers.forked import start_server
from tests.training.conftest import rl_overrides, sft_overrides, tiny_overrides, write_texts

FEW_STEPS = ("max_steps=3", "evaluation.every_steps=2", "trainer.checkpoint_every_steps=100")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run: tokenizer, base, sft and rl, three steps each."""
    start_server()  # it imports meanwhile
    place = tmp_path_factory.mktemp("notebooks")
    write_texts(place / "texts")
    for stage in (tiny_overrides(place), sft_overrides(place), rl_overrides(place)):
        assert main(["train", "run=whole", *stage, *FEW_STEPS]) == 0
    for name, lr, flops, bpb in (("one", 0.02, 1e9, 3.1), ("two", 0.04, 2e9, 2.9)):
        entry = Entry(
            name,
            "base",
            "finished",
            "2026-11-29T12:00:00+00:00",
            changed={"optim.matrix_lr": lr, "max_steps": 3},
            data="texts",
            tokenizer="pairs",
            steps=3,
            tokens=768,
            flops=flops,
            seconds=1.5,
            metrics={"val/bpb": bpb},
            errors={"val/bpb": 0.1},
        )
        append(place / "runs", entry)
    return place / "runs" / "whole"
