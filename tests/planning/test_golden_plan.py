"""Depth and ratio → plan, against the reference's table: integers exact, floats rtol 1e-12."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from nanochat_pl.model.config import ModelSettings
from nanochat_pl.optim import OptimSettings, ScheduleSettings
from nanochat_pl.optim.settings import RECIPE
from nanochat_pl.planning import HorizonSettings, make_plan

NAMES = {
    "n_embd": "width",
    "n_head": "num_heads",
    "flops_per_token": "flops_per_token",
    "target_tokens": "horizon_tokens",
    "total_batch_size": "total_batch_tokens",
    "num_iterations": "num_steps",
    "batch_lr_scale": "batch_lr_scale",
    "weight_decay": "weight_decay",
    "dmodel_lr_scale": "width_lr_scale",
    "window_sizes": "windows",
}


def test_golden_plan(golden: Path) -> None:
    table = json.loads((golden / "plan.json").read_text(encoding="utf-8"))
    assert len(table["plans"]) == 27
    settings = table["settings"]
    model = ModelSettings(
        aspect_ratio=settings["aspect_ratio"],
        head_dim=settings["head_dim"],
        sequence_len=settings["sequence_len"],
        window_pattern=settings["window_pattern"],
    )
    assert model == ModelSettings() and RECIPE["weight_decay"] == settings["weight_decay"]
    for row in table["plans"]:
        assert set(row) == {"depth", "target_param_data_ratio", "params", *NAMES}, "every field is compared"
        horizon = HorizonSettings(tokens_per_parameter=row["target_param_data_ratio"])
        settings_of_row = dataclasses.replace(model, depth=row["depth"])
        plan = make_plan(settings_of_row, horizon, OptimSettings(), vocab_size=settings["vocab_size"])
        for golden_name, name in NAMES.items():
            want = row[golden_name]
            assert plan[name] == (pytest.approx(want, rel=1e-12) if isinstance(want, float) else want), (row, name)
        for group, number in row["params"].items():
            assert plan[f"parameters_{group}"] == number, (row["depth"], group)
        assert plan["tokens_per_parameter"] == row["target_param_data_ratio"]
        assert plan["total_flops"] == row["flops_per_token"] * row["num_iterations"] * row["total_batch_size"]


def test_golden_schedules_are_those_of_the_plans_settings(golden: Path) -> None:
    """Rates, momentum and decay at 78 steps of four lengths are compared in tests/optim; here their settings."""
    table = json.loads((golden / "plan.json").read_text(encoding="utf-8"))
    schedule, settings = ScheduleSettings(), table["settings"]
    assert schedule.warmup_steps == settings["warmup_steps"]
    assert schedule.warmdown_ratio == settings["warmdown_ratio"]
    assert schedule.final_lr_fraction == settings["final_lr_frac"]
    assert {row["num_iterations"] for row in table["schedules"]} == {50, 300, 1680, 6000}
