"""One tiny run with all stages, and a ledger beside it, for all notebooks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.common.files import write_json
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
    write_ladder(place / "runs")
    return place / "runs" / "whole"


def write_ladder(runs: Path) -> None:
    """Entries of twelve base stages, four sizes for each of three budgets: the best size is that with 10 tokens a
    parameter."""
    for budget in (1e12, 4e12, 1.6e13):
        best = math.sqrt(budget / 60)
        for number, factor in enumerate((0.5, 0.8, 1.3, 2.0)):
            size, name = round(best * factor), f"flops{budget:.0e}-{number}"
            planned = {"value": size, "formula": "given", "inputs": {}, "section": "Horizon and batch"}
            (runs / name / "base").mkdir(parents=True)
            write_json(runs / name / "base" / "plan.json", {"scaling_parameters": planned})
            entry = Entry(
                name,
                "base",
                "finished",
                "2026-11-29T12:00:00+00:00",
                settings={"flops_budget": budget},
                changed={"flops_budget": budget, "optim.matrix_lr": 0.02},
                data="texts",
                tokenizer="pairs",
                steps=3,
                tokens=round(budget / 6 / size),
                flops=budget,
                seconds=1.5,
                metrics={"val/bpb": 1 + 300 * budget**-0.2 + 0.05 * math.log(factor) ** 2 + 0.0005 * (-1) ** number},
                errors={"val/bpb": 0.01},
            )
            append(runs, entry)
