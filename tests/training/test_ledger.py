"""The ledger: an entry when the process of a stage ends, however it does; and a training that never fails for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import UserError
from nanochat_pl.ledger import LEDGER, Entry, newest, read_ledger
from nanochat_pl.training import run as training_run
from tests.training.conftest import copy_unfinished, tiny_overrides


def entries_of(place: Path, run: str, stage: str = "base") -> list[Entry]:
    return [each for each in read_ledger(place / "runs") if (each.run, each.stage) == (run, stage)]


def test_a_finished_training_has_one_entry(place: Path, train: Callable[..., int]) -> None:
    (entry,) = entries_of(place, "whole")
    assert (entry.exit, entry.error, entry.steps, entry.tokens) == ("finished", None, 40, 40 * 256)
    assert entry.flops > 0 and entry.seconds > 0 and entry.parent_run is None
    assert entry.settings["model.depth"] == 2 and entry.settings["optim.scalar_lr"] == 0.05
    assert (
        entry.changed["model.depth"] == 2 and "optim.max_grad_norm" not in entry.changed and "run" not in entry.changed
    )
    assert entry.data and entry.tokenizer and entry.machine["processes"] == 1 and entry.machine["device"]
    assert entry.best["val/bpb"] <= entry.metrics["val/bpb"] and entry.errors["val/bpb"] > 0
    assert "train/loss" in entry.metrics and not [name for name in entry.metrics if "stderr" in name]
    (sft,) = entries_of(place, "whole", "sft")
    assert sft.changed["model.depth"] == 2, "it is its parent's, and not the default"
    assert (sft.tokenizer, sft.exit) == (entry.tokenizer, "finished")
    assert entries_of(place, "whole", "tokenizer") == [], "base made it on its way"
    assert train("run=whole") == 0  # found finished
    assert len(entries_of(place, "whole")) == 1


def test_a_tokenizer_has_one(place: Path) -> None:
    assert main(["train", "stage=tokenizer", "run=words", *tiny_overrides(place)]) == 0
    (entry,) = entries_of(place, "words", "tokenizer")
    (base,) = entries_of(place, "whole")
    assert (entry.exit, entry.tokenizer, entry.steps) == ("finished", base.tokenizer, 0)
    assert entry.data and entry.seconds > 0


def test_stopped_failed_and_finished_are_entries_of_one_stage(
    place: Path, train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_unfinished(place, "thrice")
    for error in (KeyboardInterrupt(), RuntimeError("two\nlines")):
        with monkeypatch.context() as patch:
            patch.setattr(training_run, "_finish", lambda *rest, error=error: (_ for _ in ()).throw(error))
            assert train("run=thrice") != 0
    assert train("run=thrice") == 0
    entries = entries_of(place, "thrice")
    assert [each.exit for each in entries] == ["stopped", "failed", "finished"]
    assert [each.error for each in entries] == [None, "RuntimeError: two", None]
    assert {each.steps for each in entries} == {40} and newest(entries) == entries[-1:]


def test_the_start_of_a_training_is_noted_and_what_is_refused_after_it_has_failed(
    place: Path, train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_unfinished(place, "begun")

    def refuse(*rest: object) -> None:
        assert [each.exit for each in entries_of(place, "begun")] == ["started"]
        raise UserError("no such thing")

    monkeypatch.setattr(training_run, "_make_stage", refuse)
    assert train("run=begun") == 2
    (entry,) = entries_of(place, "begun")
    assert (entry.exit, entry.error) == ("failed", "no such thing")
    assert entry.data and entry.settings["model.depth"] == 2


@pytest.mark.parametrize("wrong", ["data.path=nowhere", "optim.matrix_lr=0.5"])
def test_a_start_that_is_refused_leaves_no_entry(wrong: str, place: Path, train: Callable[..., int]) -> None:
    copy_unfinished(place, "refused") if wrong.startswith("optim") else None
    before = read_ledger(place / "runs")
    assert train("run=refused", wrong) == 2
    assert read_ledger(place / "runs") == before
    shutil.rmtree(place / "runs" / "refused", ignore_errors=True)


def test_a_ledger_that_cannot_be_written_costs_no_training(
    place: Path, tmp_path: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / LEDGER).mkdir()
    copied = shutil.copytree(copy_unfinished(place, "unwritten"), tmp_path / "unwritten")
    assert train("run=unwritten", f"paths.runs={tmp_path}") == 0
    assert (copied / "base" / "finished.json").is_file()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("The ledger has no entry of ")]
    assert len(said) == 1 and str(tmp_path / LEDGER) in said[0]


def test_bench_adds_what_inference_costs(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place / "runs" / "whole", tmp_path / "whole")
    shutil.copy(place / "runs" / LEDGER, tmp_path)
    keys = [
        "batch_sizes=[1,2]",
        "prompt_tokens=4",
        "new_tokens=3",
        "repeats=1",
        "accelerator=cpu",
        "dtype=float32",
        "compile=false",
    ]
    assert main(["bench", "run=whole", "stage=base", f"paths.runs={tmp_path}", *keys]) == 0
    trained, measured = [each for each in read_ledger(tmp_path) if (each.run, each.stage) == ("whole", "base")]
    assert not trained.inference and measured.metrics == trained.metrics and measured.exit == "finished"
    assert measured.inference["first_token_ms"] > 0 and measured.inference["tokens_per_second_at_2"] > 0
    # Keys and values of 2 blocks with 2 heads of 16 numbers in float32, and the token's id.
    assert measured.inference["cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 4 + 8
    assert measured.inference_on["dtype"] == "float32"
