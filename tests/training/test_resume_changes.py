"""Going on under other settings or with other code: told, recorded, or refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanochat_pl.bundle.stage_info import load_stage_info
from nanochat_pl.cli import run_record
from nanochat_pl.common.files import read_json, write_json
from nanochat_pl.optim.schedules import ScheduleSettings, schedule_values
from nanochat_pl.training.checkpoint.history import note_changes, read_changes
from tests.training.conftest import copy_unfinished, metrics_of, same_weights, start_run, weights_of

CODE_CHANGES = run_record._code_changes


@pytest.fixture(autouse=True)
def same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody had edited the package since the run began."""
    monkeypatch.setattr(run_record, "_code_changes", lambda then, now: [])


def test_changes_without_a_say_are_told_and_recorded(
    place: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_unfinished(place, "told")
    for _ in range(2):  # the second start has nothing to tell
        assert train("run=told", "trainer.keep_last=3", "trainer.log_every_steps=2") == 0
        (folder / "base" / "finished.json").unlink()
    told = "trainer.keep_last 2 → 3; trainer.log_every_steps 1 → 2"
    assert capsys.readouterr().out.count(f"Since the last start: {told}.\n") == 1
    (line,) = read_changes(folder / "base")
    assert line["changes"] == told.split("; ")
    assert load_stage_info(folder / "base" / "bundle").changes == [line]
    assert same_weights(weights_of(place / "runs" / "whole", "base"), weights_of(folder, "base"))


def test_a_run_that_goes_on_as_it_was_says_nothing(
    place: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_unfinished(place, "as-it-was")
    assert train("run=as-it-was") == 0
    assert "Since the last start" not in capsys.readouterr().out
    assert read_changes(folder / "base") == []


def test_other_code_is_told(
    place: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_record, "_code_changes", CODE_CHANGES)
    folder = copy_unfinished(place, "other-code")
    path = folder / "base" / "about.json"
    about = read_json(path)
    write_json(
        path, {**about, "source_sha256": "0" * 16, "git": "abc", "versions": {**about["versions"], "torch": "1.0"}}
    )
    for _ in range(2):
        assert train("run=other-code") == 0
        (folder / "base" / "finished.json").unlink()
    out = capsys.readouterr().out
    assert out.count("torch 1.0 → ") == 1 and out.count("the code of nanochat_pl (abc → ") == 1
    (line,) = read_changes(folder / "base")
    assert len(line["code"]["source_sha256"]) == 16 and line["code"]["source_sha256"] != "0" * 16


def test_a_change_that_alters_the_result_is_refused_unless_it_is_asked_for(
    place: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_unfinished(place, "other-lr")
    (folder / "base" / "checkpoints" / "step=000040.ckpt").unlink()
    assert train("run=other-lr", "optim.matrix_lr=0.03") == 2
    error = capsys.readouterr().err
    assert train("run=other-lr", "optim.matrix_lr=0.03", "check_only=true") == 2
    assert capsys.readouterr().err == error, "a check refuses what a start refuses"
    assert train("run=other-lr", "check_only=true") == 0
    assert train("run=other-lr", "optim.matrix_lr=0.03", "resume_with_changes=true", "check_only=true") == 0
    capsys.readouterr()
    assert "optim.matrix_lr=0.03" in error and "begun with optim.matrix_lr=0.02" in error
    assert "resume_with_changes=true" in error
    assert train("run=other-lr", "optim.matrix_lr=0.03", "resume_with_changes=true") == 0
    told = "optim.matrix_lr 0.02 → 0.03 (it alters the result)"
    assert told in capsys.readouterr().out
    assert load_stage_info(folder / "base" / "bundle").changes[0]["changes"] == [told]
    assert not same_weights(weights_of(place / "runs" / "whole", "base"), weights_of(folder, "base"))
    assert train("run=other-lr", "optim.matrix_lr=0.03") == 0, "from then on these are the settings of the run"


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("model.depth=4", "the weights are of that model"),
        ("total_batch_tokens=128", "rows would be left out or seen twice"),
    ],
)
def test_what_cannot_change_is_refused_with_its_reason(
    setting: str, reason: str, place: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_unfinished(place, f"fixed-{setting}".replace("=", "-"))
    assert train(f"run={folder.name}", setting, "resume_with_changes=true") == 2
    error = capsys.readouterr().err
    assert setting in error and reason in error and "go on all the same" not in error
    assert read_changes(folder / "base") == []


def test_a_finished_run_is_trained_longer(
    place: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The schedule is a function of step and horizon: the learning rate jumps, and that is said."""
    folder = start_run(place, "longer", "base")
    shutil.copytree(place / "runs" / "whole" / "base", folder / "base")
    assert train("run=longer", "max_steps=50") == 2
    assert "train on, with a larger max_steps and resume_with_changes=true" in capsys.readouterr().err
    longer = ["run=longer", "max_steps=50", "resume_with_changes=true"]
    assert train(*longer, "check_only=true") == 0
    assert train(*longer, "model.depth=4", "check_only=true") == 2
    assert "the weights are of that model" in capsys.readouterr().err
    assert (folder / "base" / "finished.json").exists()
    assert train(*longer) == 0
    schedule = ScheduleSettings(warmup_steps=4)
    was, now = (schedule_values(schedule, 40, steps).lr_multiplier for steps in (40, 50))
    out = capsys.readouterr().out
    assert "Horizon 40 → 50 steps." in out
    assert f"in the next step, 41, the learning rates jump from {was:.4g} of their peak to {now:.4g}." in out
    rows = metrics_of(folder, "base")
    assert [int(row[0]) for row in rows] == list(range(51))
    assert rows[:40] == metrics_of(place / "runs" / "whole", "base")[:40]
    assert load_stage_info(folder / "base" / "bundle").step == 50
    changes = [line["changes"] for line in read_changes(folder / "base")]
    assert changes[0] == ["max_steps 40 → 50 (it alters the result)"] and changes[1][0].startswith("Horizon 40 → 50")


@pytest.mark.parametrize("allowed", [False, True])
def test_a_shorter_horizon_than_what_was_trained(
    allowed: bool, place: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_unfinished(place, f"shorter-{allowed}")
    assert train(f"run={folder.name}", "max_steps=20", f"resume_with_changes={allowed}".lower()) == 2
    assert ("40 of them are made" if allowed else "begun with max_steps=40") in capsys.readouterr().err
    assert train(f"run={folder.name}") == 0, "what was refused has changed nothing"
    assert read_changes(folder / "base") == []
    assert train(f"run={folder.name}", "max_steps=50", "resume_with_changes=true", "data.path=nowhere") == 2
    assert (folder / "base" / "finished.json").exists()


@pytest.mark.slow
def test_other_text_of_the_same_name(
    place: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = start_run(place, "other-text", "base")
    texts = shutil.copytree(place / "texts", tmp_path / "texts")
    settings = ["run=other-text", f"data.path={texts}"]
    assert train(*settings) == 0
    (folder / "base" / "finished.json").unlink()
    (folder / "base" / "checkpoints" / "step=000040.ckpt").unlink()
    (texts / "more.txt").write_text("the dog sat on the cat", encoding="utf-8")
    assert train(*settings) == 2
    assert "resume_with_changes=true" in capsys.readouterr().err
    assert train(*settings, "resume_with_changes=true") == 0
    assert "the rows from step 36 on are others" in capsys.readouterr().out
    (line,) = read_changes(folder / "base")
    assert line["changes"][0].startswith("data ")


def test_the_record_of_changes_is_json_and_says_nothing_twice(tmp_path: Path) -> None:
    code: dict[str, Any] = {"git": "", "source": "a", "versions": {}}
    for changes in (["a 1 → 2"], ["a 1 → 2"], ["b 1 → 2"]):
        note_changes(tmp_path, changes, code)
    lines = [json.loads(line) for line in (tmp_path / "changes.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["changes"] for line in lines] == [["a 1 → 2"], ["b 1 → 2"]]
    assert read_changes(tmp_path) == lines
