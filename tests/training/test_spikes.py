"""Loss spikes: a step far above those before it is written down with its rows, once, over kills and processes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_pl.data.batch import StepBatch
from nanochat_pl.distributed import collectives
from nanochat_pl.training.callbacks import loss_spikes
from nanochat_pl.training.callbacks.loss_spikes import WINDOW, LossSpikes, middle_and_deviation, worst_rows
from nanochat_pl.training.datamodule import StepRows
from tests.helpers.training import ROWS_PER_STEP, fit_tiny
from tests.regressions.test_fit import stop_after


class At:
    """A trainer that has made so many steps, and its stage."""

    def __init__(self, step: int) -> None:
        self.global_step = step

    def inspect_command(self, step: int) -> str:
        return f"doctor step={step}"


def lines_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "spikes.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def batch_of(targets: list[list[int]], first_row: int = 0) -> StepBatch:
    tensor = torch.tensor(targets)
    return StepBatch(tensor, tensor, int((tensor >= 0).sum()), first_row=first_row)


def feed(callback: LossSpikes, losses: list[float], first_step: int = 1, skipped: bool = False) -> None:
    for step, loss in enumerate(losses, first_step):
        outputs = {"loss": torch.tensor(loss), "row_losses": torch.tensor([loss * 2]), "skipped": skipped}
        callback.on_train_batch_end(
            At(step),
            At(step),
            outputs,  # type: ignore[arg-type]
            batch_of([[1, 1]], first_row=step - 1),
            step - 1,
        )


def noise(count: int, seed: int = 0) -> list[float]:
    chance = random.Random(seed)
    return [3 + chance.gauss(0, 0.1) for _ in range(count)]


def test_the_deviation_is_that_of_a_normal_distribution_and_no_outlier_moves_it() -> None:
    losses = noise(100_001)
    middle, deviation = middle_and_deviation(losses)
    assert middle == pytest.approx(3, abs=0.002) and deviation == pytest.approx(0.1, rel=0.02)
    with_outliers = middle_and_deviation([*losses, *[50.0] * 1_000])
    assert with_outliers == pytest.approx((middle, deviation), rel=0.03)
    assert middle_and_deviation([2.0] * 5) == (2.0, 0.002), "losses that stand still have a deviation all the same"


def test_a_spike_is_told_from_noise_and_does_not_hide_the_next(tmp_path: Path) -> None:
    callback = LossSpikes(tmp_path / "it" / "base", sigmas=6)
    callback.path.parent.mkdir(parents=True)
    losses = noise(1_000)
    losses[500] = losses[503] = 3.9
    feed(callback, losses)
    assert [line["step"] for line in lines_of(callback.path.parent)] == [501, 504]
    assert lines_of(callback.path.parent)[0]["expected"] == pytest.approx(3, abs=0.05)


def test_a_falling_loss_and_the_first_steps_are_no_spikes(tmp_path: Path) -> None:
    feed(LossSpikes(tmp_path, sigmas=6), [9.0, 10.0, 400.0] * 33)
    falling = [10 / (1 + step / 20) + extra for step, extra in enumerate(noise(600))]
    feed(LossSpikes(tmp_path, sigmas=6), falling)
    assert lines_of(tmp_path) == []


def test_a_level_that_stays_is_the_new_one(tmp_path: Path) -> None:
    feed(LossSpikes(tmp_path, sigmas=6), [*noise(200), *(loss + 2 for loss in noise(400, seed=1))])
    steps = [line["step"] for line in lines_of(tmp_path)]
    assert steps and steps[0] == 201 and steps[-1] <= 200 + WINDOW // 2


def test_zero_is_never_and_skipped_steps_do_not_count(tmp_path: Path) -> None:
    never = LossSpikes(tmp_path, sigmas=0)
    feed(never, [*noise(200), 1e9])
    callback = LossSpikes(tmp_path, sigmas=6)
    feed(callback, noise(200))
    before = callback.state_dict()
    feed(callback, [float("nan"), float("inf")], 201)
    feed(callback, [7.0], 203, skipped=True)
    assert callback.state_dict() == before and lines_of(tmp_path) == []


def test_the_worst_rows_are_those_that_add_most_to_the_excess() -> None:
    """A long row has many nats and a row of one target a high loss: neither makes the spike by that alone."""
    long, short, bad = [1] * 6, [1] + [-1] * 5, [1] * 4 + [-1] * 2
    nats = torch.tensor([6 * 2.0, 1 * 6.0, 4 * 5.0])
    worst = worst_rows(nats, batch_of([long, short, bad], first_row=40), expected=2.0)
    assert [(row["row"], row["loss"], row["excess_nats"]) for row in worst] == [(42, 5.0, 12.0), (41, 6.0, 4.0)]


def test_rows_of_all_processes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"rows": [7, 9], "worst": [{"row": 8, "loss": 9.0, "excess_nats": 3.0}]}
    monkeypatch.setattr(collectives, "all_gather_str", lambda text: [text, json.dumps(other)])
    callback = LossSpikes(tmp_path, sigmas=6)
    feed(callback, noise(200))
    feed(callback, [4.0], first_step=6)
    (line,) = lines_of(tmp_path)
    assert (line["first_row"], line["last_row"]) == (5, 8)
    assert [row["row"] for row in line["worst_rows"]] == [8, 5]
    monkeypatch.setattr(collectives, "is_rank_zero", lambda: False)
    feed(callback, [4.0])
    assert len(lines_of(tmp_path)) == 1


def test_a_fit_writes_each_spike_once_over_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loss_spikes, "WINDOW", 8)
    read = StepRows.__getitem__

    def spoiled(self: StepRows, step: int) -> StepBatch:
        batch = read(self, step)
        if step == 11:
            batch.targets[2] = 263  # a token that no text has
        return batch

    monkeypatch.setattr(StepRows, "__getitem__", spoiled)
    fit_tiny(tmp_path, num_steps=14)
    (line,) = whole = lines_of(tmp_path)
    assert (line["step"], line["first_row"], line["last_row"]) == (12, 11 * ROWS_PER_STEP, 12 * ROWS_PER_STEP - 1)
    assert line["worst_rows"][0]["row"] == 11 * ROWS_PER_STEP + 2
    run = f"run={tmp_path.parent.name} paths.runs={tmp_path.parent.parent}"
    assert f"nanochat-pl doctor stage={tmp_path.name} {run} step=12" in capsys.readouterr().out
    for step in (10, 13, 0):
        stop_after(tmp_path, step)
        fit_tiny(tmp_path, num_steps=14)
        assert lines_of(tmp_path) == whole, step
