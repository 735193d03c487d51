"""Tokenizing a part of the shards, as one of several machines."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nanochat_pl.cli.main import main
from tests.cli.test_experiments_shrunk import SMALL

KEYS = [*(key for key in SMALL if not key.startswith("stage=")), "run=x", "paths.cache=cache", "data.path=texts"]


@pytest.fixture
def texts(here: Path) -> Path:
    for number in range(4):
        file = here / "texts" / f"{number}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n\n".join(f"Text {number}, line {i} about {i * 7919 % 1000}." for i in range(300)))
    return here


def test_parts_together_are_all_that_a_training_reads(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "stage=tokenizer", *KEYS]) == 0
    for number in range(3):
        assert main(["tokenize", *KEYS, f"shards={number}/3"]) == 0
    cached = {path.name for path in (texts / "cache" / "tokens").iterdir() if path.is_dir()}
    capsys.readouterr()
    assert main(["tokenize", *KEYS]) == 0
    shown = capsys.readouterr().out
    total = shown.partition(" of them were there before")[0].rpartition("; ")[2]
    assert f"Tokenized: {total} of {total} shards" in shown, "all of them were there"
    assert main(["train", "stage=base", *KEYS]) == 0
    assert {path.name for path in (texts / "cache" / "tokens").iterdir() if path.is_dir()} == cached


def test_a_shard_that_went_is_made_again(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "stage=tokenizer", *KEYS]) == 0
    assert main(["tokenize", *KEYS]) == 0
    shutil.rmtree(next(path for path in (texts / "cache" / "tokens").iterdir() if path.is_dir()))
    capsys.readouterr()
    assert main(["tokenize", *KEYS]) == 0
    assert "0 of them were there before" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["shards=3/3"], "shards=3/3: must be I/N with I from 0 to N - 1"),
        (["shards=a"], "shards=a: must be I/N"),
        (["shards=1/0"], "shards=1/0: must be I/N"),
        (["stage=sft"], "stage=sft: only the text of stage=base is tokenized ahead."),
        ([], "there is no tokenizer yet, and all machines need the same one."),
        (["shard=1/2"], "shard: there is no such key; did you mean shards?"),
    ],
)
def test_mistakes_are_said(keys: list[str], expected: str, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", *KEYS, *keys]) == 2
    assert expected in capsys.readouterr().err
