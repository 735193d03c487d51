"""Depth and ratio → plan, against the reference's table: integers exact, floats rtol 1e-12."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from nanochat_pl.cli.train import compose_train
from nanochat_pl.model.config import ModelSettings
from nanochat_pl.optim.config import OptimSettings
from nanochat_pl.optim.rules import RECIPE
from nanochat_pl.optim.schedules import ScheduleSettings
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


ERA_NAMES = {
    "n_embd": "width",
    "n_head": "num_heads",
    "scaling_params": "scaling_parameters",
    "flops_per_token": "flops_per_token",
    "target_tokens": "horizon_tokens",
    "total_batch_size": "total_batch_tokens",
    "num_iterations": "num_steps",
    "total_tokens": "total_tokens",
    "batch_lr_scale": "batch_lr_scale",
    "dmodel_lr_scale": "width_lr_scale",
    "weight_decay": "weight_decay",
    "window_sizes": "windows",
}
GROUPS = {
    "lm_head": "lm_head",
    "wte": "wte",
    "value_embeds": "value_embedding",
    "resid_lambdas": "resid_lambda",
    "x0_lambdas": "x0_lambda",
    "muon": "matrix",
}


@pytest.mark.parametrize(("era", "experiment"), [("oct2025", "nanochat_2025_10"), ("feb2026", "nanochat_2026_02")])
def test_golden_plans_of_older_recipes(golden: Path, era: str, experiment: str) -> None:
    """One word, experiment=NAME, and the depth, ratio, steps or batch that the table's row was made for."""
    table = json.loads((golden / f"era_{era}" / "plan.json").read_text(encoding="utf-8"))
    config = compose_train([f"experiment={experiment}", "stage=base"]).config
    facts = table["settings"]
    assert (config.tokenizer.vocab_size, config.model.sequence_len) == (facts["vocab_size"], facts["sequence_len"])
    assert (config.model.aspect_ratio, config.model.head_dim) == (facts["aspect_ratio"], facts["head_dim"])
    assert config.tokens_per_parameter == facts["default_ratio"]
    assert config.total_batch_tokens == facts.get("total_batch_size")
    assert config.optim.max_grad_norm == facts.get("grad_clip")
    evaluation = config.evaluation
    assert (evaluation.every_steps, evaluation.num_tokens) == (facts["eval_every"], facts["eval_tokens"])
    assert (evaluation.core_every_steps, evaluation.samples_every_steps) == (
        facts["core_metric_every"],
        facts["sample_every"],
    )
    assert evaluation.core.max_per_task == facts["core_metric_max_per_task"] and evaluation.at_start is not False
    known = {"depth", "target_param_data_ratio", "num_iterations_given", "total_batch_size_given", "params"}
    for row in table["plans"]:
        assert set(row) <= {*known, "initial_lrs", *ERA_NAMES}, "every field is compared"
        horizon = HorizonSettings(
            max_steps=_given(row.get("num_iterations_given")),
            tokens_per_parameter=row["target_param_data_ratio"],
            counted_parameters=config.counted_parameters,
            total_batch_tokens=_given(row.get("total_batch_size_given")) or config.total_batch_tokens,
        )
        model = dataclasses.replace(config.model, depth=row["depth"])
        plan = make_plan(model, horizon, config.optim, vocab_size=facts["vocab_size"], schedule=config.schedule)
        for golden_name, name in ERA_NAMES.items():
            if golden_name in row:
                want = row[golden_name]
                assert plan[name] == (pytest.approx(want, rel=1e-12) if isinstance(want, float) else want), (row, name)
        for group, number in row["params"].items():
            assert plan[f"parameters_{group}"] == number, (row["depth"], group)
        rates = {name.removeprefix("lr_"): plan[name] for name in plan.values if name.startswith("lr_")}
        assert rates == {GROUPS[name]: pytest.approx(lr, rel=1e-12) for name, lr in row["initial_lrs"].items()}


def _given(value: int | None) -> int | None:
    return None if value in (None, -1) else value


@pytest.mark.parametrize(("depth", "logarithm"), [(31, 20), (32, 21), (55, 21), (59, 22)])
def test_depths_at_which_another_exponent_of_the_batch_shows(depth: int, logarithm: int) -> None:
    """At those of the golden table, 0.4 in place of 0.383 rounds to the same powers of two."""
    plan = make_plan(ModelSettings(depth=depth), HorizonSettings(), OptimSettings(), vocab_size=2**15)
    assert plan["total_batch_tokens"] == 2**logarithm
