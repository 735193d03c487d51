"""Schedules: exact against the golden table, and the bounds that others broke."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanochat_pl.optim.schedules import ScheduleSettings, StepValues, schedule_values

STAGES = {
    "base": ScheduleSettings(),
    "mid": ScheduleSettings(warmup_steps=0, warmdown_ratio=0.2, final_lr_fraction=0.0),
    "sft": ScheduleSettings(
        warmup_steps=0,
        warmdown_ratio=0.5,
        initial_lr_fraction=0.8,
        final_lr_fraction=0.0,
        momentum_peak=0.95,
        momentum_end=0.95,
        momentum_ramp_steps=300,
        weight_decay="none",
    ),
    "rl": ScheduleSettings(warmup_steps=0, warmdown_ratio=1.0, initial_lr_fraction=0.05, final_lr_fraction=0.0),
}


def test_golden_schedules(golden: Path) -> None:
    table = json.loads((golden / "plan.json").read_text(encoding="utf-8"))
    full_decay = table["settings"]["weight_decay"]
    assert len(table["schedules"]) == 78
    for row in table["schedules"]:
        values = schedule_values(ScheduleSettings(), row["step"], row["num_iterations"])
        assert values.lr_multiplier == pytest.approx(row["lr_multiplier"], rel=1e-12), row
        assert values.muon_momentum == pytest.approx(row["muon_momentum"], rel=1e-12), row
        decay = full_decay * values.weight_decay_multiplier
        assert decay == pytest.approx(row["muon_weight_decay"], rel=1e-12, abs=1e-300), row


def test_the_stages_of_the_recipe() -> None:
    assert schedule_values(STAGES["mid"], 80, 100).lr_multiplier == 1.0
    assert schedule_values(STAGES["mid"], 90, 100).lr_multiplier == pytest.approx(0.5)
    assert schedule_values(STAGES["sft"], 50, 100) == StepValues(0.8, pytest.approx(0.85 + 0.1 * 50 / 300), 0.0)
    assert schedule_values(STAGES["sft"], 75, 100).lr_multiplier == pytest.approx(0.4)
    assert schedule_values(STAGES["sft"], 300, 400).muon_momentum == pytest.approx(0.95)
    assert schedule_values(STAGES["rl"], 0, 10).lr_multiplier == pytest.approx(0.05)
    assert schedule_values(STAGES["rl"], 5, 10).lr_multiplier == pytest.approx(0.025)


def test_past_the_end_the_values_stay_at_the_end() -> None:
    end = StepValues(pytest.approx(0.05), pytest.approx(0.90), pytest.approx(0.0))
    assert schedule_values(ScheduleSettings(), 1000, 1000) == end
    assert schedule_values(ScheduleSettings(), 2000, 1000) == end


def test_the_values_are_a_pure_function_of_the_step() -> None:
    """Elsewhere processes that had called the scheduler a different number of times had different rates."""
    forward = [schedule_values(ScheduleSettings(), step, 500) for step in range(500)]
    backward = [schedule_values(ScheduleSettings(), step, 500) for step in reversed(range(500))]
    assert forward == backward[::-1]


def test_a_constant_weight_decay() -> None:
    settings = ScheduleSettings(weight_decay="constant")
    assert {schedule_values(settings, step, 10).weight_decay_multiplier for step in range(10)} == {1.0}


@pytest.mark.parametrize("num_steps", [1, 2, 20, 30, 100])
def test_a_warmup_longer_than_the_run_leaves_room_for_the_warmdown(num_steps: int) -> None:
    """Thirty steps ended at 0.75 of the learning rate, on their way up."""
    fitted = ScheduleSettings().fitted(num_steps)
    multipliers = [schedule_values(fitted, step, num_steps).lr_multiplier for step in range(num_steps)]
    peak = multipliers.index(max(multipliers))
    assert multipliers[peak:] == sorted(multipliers[peak:], reverse=True)
    if num_steps >= 20:
        assert max(multipliers) == 1.0 and multipliers[-1] < 0.2


def test_a_warmup_that_has_room_stays_as_it_is() -> None:
    settings = ScheduleSettings()
    assert settings.fitted(115) is settings and settings.fitted(10_000) is settings
    assert ScheduleSettings(warmup_ratio=0.5, warmdown_ratio=0.5).fitted(64).warmup_ratio == 0.5
