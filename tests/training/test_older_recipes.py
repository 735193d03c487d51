"""An older recipe through all stages: packing, masks, clipping, validation before the first step; sizes made tiny."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat_pl import load_bundle
from nanochat_pl.cli.main import main
from nanochat_pl.cli.train import compose_train
from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.common.errors import UserError
from tests.training.conftest import copy_unfinished, metrics_of, sft_overrides, tiny_overrides
from tests.training.test_mid import prepared_of


def overrides_of(place: Path, stage: str, era: str = "nanochat_2025_10") -> list[str]:
    """The tiny settings, but for what the older recipe says."""
    if stage == "base":
        kept = [text for text in tiny_overrides(place) if not text.startswith(("schedule.", "optim.scalar"))]
        groups = [f"model={era}", "data.packing=stream"]
    else:
        kept = [text.replace("stage=sft", f"stage={stage}") for text in sft_overrides(place)]
        groups = [f"mixture.packing={'stream' if stage == 'mid' else 'pad_one'}", "stage.warm_start=false"]
    name = era if stage == "base" else f"{era}_{stage}"
    return [*kept, *groups, f"optim={era}", f"schedule={name}"]


@pytest.fixture(scope="module")
def autumn(place: Path) -> Path:
    """A run of autumn's recipe with all of its stages."""
    for stage in ("base", "mid", "sft"):
        steps = ["max_steps=12", "evaluation.every_steps=6"] if stage == "base" else ["max_steps=4"]
        assert main(["train", "run=autumn", *overrides_of(place, stage), *steps]) == 0
    return place / "runs" / "autumn"


def rows_of(run: Path, stage: str) -> list[dict[str, str]]:
    with (run / stage / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_base_is_validated_before_its_first_step_and_learns(autumn: Path) -> None:
    rows = rows_of(autumn, "base")
    assert [int(row["step"]) for row in rows] == list(range(13))
    measured = {int(row["step"]): float(row["val/bpb"]) for row in rows if row["val/bpb"]}
    assert sorted(measured) == [0, 6, 12] and measured[12] < measured[6] < measured[0]
    assert rows[0]["train/loss"] == "", "nothing was trained on yet"
    assert [row["step"] for row in rows_of(autumn, "sft") if row["step"] == "0"] == [], "later stages: where asked for"


def test_the_plan_and_the_bundle_say_what_the_recipe_is(autumn: Path) -> None:
    plan = json.loads((autumn / "base" / "plan.json").read_text(encoding="utf-8"))
    assert plan["muon"]["value"] == "newton_schulz (norm x 1, bfloat16), plain decay"
    assert plan["adamw_wte"]["value"] == [0.8, 0.95, 1e-10, 0.0] and plan["max_grad_norm"]["value"] == 1.0
    assert plan["batch_lr_scale"]["value"] == 1.0 and plan["weight_decay"]["value"] == 0.0
    assert plan["warmup_steps"]["value"] == 0 and plan["warmdown_steps"]["value"] == round(0.2 * 12)
    settings = load_bundle(autumn / "base" / "bundle").stage.settings
    assert settings["data"]["packing"] == "stream" and settings["optim"]["muon"]["decay"] == "plain"


def test_rows_of_base_are_one_stream(place: Path, autumn: Path) -> None:
    """Row after row the last target is the next first input; nothing is dropped or padded."""
    record = load_bundle(autumn / "base" / "bundle").stage.data
    assert record["packing"]["cropped_tokens"] == record["packing"]["padded_places"] == 0
    assert record["packing"]["placed_tokens"] + record["packing"]["pieces"] == 12 * 8 * 33


@pytest.mark.parametrize(("stage", "padded"), [("mid", False), ("sft", True)])
def test_rows_of_conversations(place: Path, autumn: Path, stage: str, padded: bool) -> None:
    prepared, mixture = prepared_of(place, ["run=autumn", *overrides_of(place, stage), "max_steps=null"])
    index, num_steps = prepared.rows.index, prepared.plan["num_steps"]
    if padded:  # one conversation to a row, each once, but those whose answer is cut off in rows so short
        kept = len(mixture) - prepared.data["rendering"]["num_without_target"]
        assert len(prepared.rows) == kept and set(index.row_starts[1:] - index.row_starts[:-1]) == {1}
        assert num_steps == -(-kept // prepared.plan["rows_per_step"])
        return
    inputs, targets = prepared.rows.read(range(len(prepared.rows)))
    assert (targets[:-1] != IGNORE_INDEX).all(), "every token is learnt, and only the last row may have padding"
    follows = [inputs[row + 1][0] == targets[row][-1] for row in range(31)]
    assert all(follows), "within 32 rows the last target is the next input"


def test_every_token_of_sft_is_learnt_where_that_is_asked_for(place: Path, autumn: Path) -> None:
    overrides = ["run=autumn", *overrides_of(place, "sft"), "mixture.packing=pad", "max_steps=2"]
    shares = []
    for mask in ("assistant", "all"):
        prepared, _ = prepared_of(place, [*overrides, f"stage.loss_mask={mask}"])
        targets = prepared.rows.read(range(len(prepared.rows)))[1]
        shares.append(float((targets != IGNORE_INDEX).mean()))
    assert shares[0] < 0.9 * shares[1]


@pytest.mark.slow
def test_a_run_that_begins_again_has_its_first_validation_once(place: Path, train: Callable[..., int]) -> None:
    """Killed before its first resume file. (Where there is one, tests/training/test_resume.py compares all metrics.)"""
    folder = copy_unfinished(place, "again")
    shutil.rmtree(folder / "base" / "checkpoints")
    assert metrics_of(folder, "base")[0][0] == "0"
    assert train("run=again") == 0
    assert metrics_of(folder, "base") == metrics_of(place / "runs" / "whole", "base")


@pytest.mark.slow
def test_validation_can_be_left_out_before_the_first_step_and_asked_for_in_sft(
    place: Path, train: Callable[..., int]
) -> None:
    assert train("run=without", "max_steps=2", "evaluation.at_start=false") == 0
    assert [row[0] for row in metrics_of(place / "runs" / "without", "base")] == ["1", "2"]
    assert train("run=without", "max_steps=1", "evaluation.at_start=true", stage="sft") == 0
    assert [bool(row[-1]) for row in metrics_of(place / "runs" / "without", "sft")] == [True, True]


def test_rows_and_tokens_of_validation_are_one_or_the_other() -> None:
    with pytest.raises(UserError) as error:
        compose_train(["evaluation.num_rows=8", "evaluation.num_tokens=4096"])
    assert error.value.problems == (
        "evaluation.num_tokens=4096: num_rows=8 says how much already; set one of them only.",
    )
