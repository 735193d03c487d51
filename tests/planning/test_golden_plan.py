"""Depth and ratio → plan, against the reference's table: integers exact, floats rtol 1e-12."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanochat_pl.model.config import ModelSettings
from nanochat_pl.optim import OptimSettings
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
    for row in table["plans"]:
        horizon = HorizonSettings(tokens_per_parameter=row["target_param_data_ratio"])
        plan = make_plan(ModelSettings(depth=row["depth"]), horizon, OptimSettings(), vocab_size=32768)
        for golden_name, name in NAMES.items():
            want = row[golden_name]
            assert plan[name] == (pytest.approx(want, rel=1e-12) if isinstance(want, float) else want), (row, name)
        for group, number in row["params"].items():
            assert plan[f"parameters_{group}"] == number, (row["depth"], group)
