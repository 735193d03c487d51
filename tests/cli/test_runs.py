"""The command `runs`: what is there, and deleting it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_pl.cli.runs import delete_run, run
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import write_json
from nanochat_pl.common.run_dir import stage_folder
from nanochat_pl.ledger import Entry, append
from tests.common.test_run_dir import HOLDER


@pytest.fixture
def runs(here: Path) -> Path:
    base = stage_folder(here / "runs", "d4", "base")
    base.create()
    write_json(base.path / "finished.json", {"step": 20, "metrics": {"val/bpb": 1.25}})
    sft = stage_folder(here / "runs", "d4", "sft")
    with sft.locked():
        (sft.path / "checkpoints").mkdir()
    (sft.path / "checkpoints" / "step=000007.ckpt").write_bytes(bytes(2**20))
    return here / "runs"


def test_the_list(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["d4", "base", "finished", "20", "1.2500", "0.0"]
    assert lines[2] == ["d4", "sft", "unfinished", "7", "1.0"]


def test_the_name_of_a_run_is_a_condition() -> None:
    with pytest.raises(UserError, match="where=run=pipe"):
        run(["run=pipe"])


def test_how_far_an_unfinished_stage_is(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last line may be half written, and the newest resume file is older than it."""
    sft = runs / "d4" / "sft"
    write_json(sft / "plan.json", {"num_steps": {"value": 150}})
    (sft / "metrics.csv").write_text("step,train/loss\n57,2.5\n58,2.4\n599", encoding="utf-8")
    run([])
    assert capsys.readouterr().out.splitlines()[2].split() == ["d4", "sft", "unfinished", "58/150", "1.0"]


def test_the_ledger_tells_a_killed_process_from_one_that_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "d4" / "base" / "finished.json").unlink()
    for stage in ("base", "sft"):
        append(runs, Entry("d4", stage, "started", "2026-11-30T00:00:00+00:00"))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(runs)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline()
    assert run(["format=csv", "columns=[stage,exit]"]) == 0
    assert capsys.readouterr().out.split() == ["stage,exit", "base,running", "sft,killed"]
    holder.kill()
    holder.wait()
    assert run(["where=exit=killed", "format=json"]) == 0
    assert [each["exit"] for each in json.loads(capsys.readouterr().out)] == ["killed", "killed"]


@pytest.mark.parametrize("content", ["", "[]", '{"step": 1', '{"step": 1, "metrics": [3]}'])
def test_a_damaged_stage_does_not_hide_the_others(content: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path := runs / "d4" / "base" / "finished.json").write_text(content, encoding="utf-8")
    (runs / "d4" / "sft" / "plan.json").write_text('{"num_steps": [3]}', encoding="utf-8")
    assert run([]) == 0
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert lines[1][:3] == ["d4", "base", "damaged"] and lines[2][:3] == ["d4", "sft", "unfinished"]
    assert f"{path.relative_to(runs.parent)}: " in said and "Bring it back from a copy; or delete it" in said


def test_a_stage_that_is_training(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "d4" / "base" / "finished.json").unlink()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(runs)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        run([])
        assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["d4", "base", "training"]
    finally:
        holder.kill()
        holder.communicate()
    run([])
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["d4", "base", "unfinished"]


def test_no_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "there are no runs yet" in capsys.readouterr().out


def test_deleting(runs: Path) -> None:
    (runs / "other").mkdir()
    assert run(["delete=d4"]) == 0
    assert not (runs / "d4").exists()
    assert (runs / "other").exists()


@pytest.mark.parametrize("key", ["stage=base", "where=steps>1", "sort=steps", "history=true"])
def test_deleting_chooses_nothing_within_a_run(key: str, runs: Path) -> None:
    """Who names a stage wants that alone to go: nothing is deleted."""
    with pytest.raises(UserError, match="delete=d4: deletes a run with all its stages"):
        run(["delete=d4", key])
    assert (runs / "d4" / "base").exists()


@pytest.mark.parametrize("name", ["d5", "../runs", ".", "", "other"])
def test_only_runs_are_deleted(runs: Path, name: str) -> None:
    (runs / "other").mkdir()
    with pytest.raises(UserError, match="there is no such run"):
        delete_run(runs, name)
    assert (runs / "d4").exists()


def test_a_folder_that_merely_has_one_with_the_name_of_a_stage_is_no_run(here: Path) -> None:
    note = here / "runs" / "mine" / "tokenizer" / "note.txt"
    note.parent.mkdir(parents=True)
    note.touch()
    with pytest.raises(UserError, match="delete=mine: there is no such run"):
        run(["delete=mine"])
    assert note.exists()


@pytest.mark.parametrize("foreign", ["important.txt", "tokenizer"])
def test_a_run_is_not_deleted_with_what_others_put_into_it(runs: Path, foreign: str) -> None:
    (runs / "d4" / "report").mkdir()
    (runs / "d4" / foreign).mkdir()
    with pytest.raises(UserError, match=f"delete=d4: .* did not write: {foreign}. Nothing was deleted.\nMove"):
        run(["delete=d4"])
    assert (runs / "d4" / "base" / "finished.json").exists()
    (runs / "d4" / foreign).rmdir()
    run(["delete=d4"])
    assert not (runs / "d4").exists()


def test_a_link_is_removed_and_not_what_it_points_to(runs: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (runs / "d4").rename(elsewhere)
    (runs / "d4").symlink_to(elsewhere)
    delete_run(runs, "d4")
    assert not (runs / "d4").is_symlink()
    assert (elsewhere / "base").exists()


def test_a_run_in_use_is_not_deleted(runs: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(runs)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is in use by process"):
            delete_run(runs, "d4")
    finally:
        holder.kill()
        holder.communicate()
    assert (runs / "d4").exists()


def test_where_rights_are_missing_nothing_is_deleted(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came before the folder that cannot be written was gone, and nothing said so."""
    before = {*runs.rglob("*")}
    access = os.access  # who runs the tests may be allowed everything
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "sft" and access(path, mode))
    with pytest.raises(UserError, match=r"delete=d4: .*sft: cannot be written\. Nothing was deleted\."):
        delete_run(runs, "d4")
    assert before <= {*runs.rglob("*")}
