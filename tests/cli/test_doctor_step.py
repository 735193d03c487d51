"""`nanochat-pl doctor step=N`: the documents of a step's rows are those that the training took."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from nanochat_pl import load_bundle
from nanochat_pl.cli.main import main
from nanochat_pl.data.batch import StepBatch
from nanochat_pl.doctor.documents import both_ends
from nanochat_pl.training.datamodule import StepRows
from tests.cli.test_doctor import column
from tests.training.conftest import sft_overrides, tiny_overrides, write_texts

Captured = pytest.CaptureFixture[str]
STEPS = 3


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[int, StepBatch]:
    """What trainings take from now on, by the step's number from 1."""
    batches: dict[int, StepBatch] = {}
    read = StepRows.__getitem__

    def noted(self: StepRows, step: int) -> StepBatch:
        return batches.setdefault(step + 1, read(self, step))

    monkeypatch.setattr(StepRows, "__getitem__", noted)
    return batches


def base(folder: Path, *without: str) -> list[str]:
    kept = [text for text in tiny_overrides(folder) if not text.startswith(("max_steps", *without))]
    return ["stage=base", *kept, f"max_steps={STEPS}"]


def assert_shown(bundle: Path, batch: StepBatch, step: int, said: str) -> None:
    """All pieces of all rows of a batch stand there, in their order, and nothing else."""
    tokenizer = load_bundle(bundle, dtype="float32").tokenizer
    first = (step - 1) * len(batch.inputs)
    end, num_targets = first + len(batch.inputs), batch.num_targets
    assert f"Step {step} of {STEPS}: rows {first} to {end - 1} (from 0), {num_targets} targets.\n" in said
    rows = re.split(r"^Row ", said, flags=re.MULTILINE)[1:]
    assert len(rows) == len(batch.inputs)
    for row, text in enumerate(rows):
        targets = batch.targets[row]
        assert text.startswith(f"{first + row}: ") and f" {int((targets >= 0).sum())} targets.\n" in text
        # The last token of a row is a target alone: where that is not trained on, it is not in the batch.
        known = targets[-1:] if targets[-1] >= 0 else targets[:0]
        ids = torch.cat([batch.inputs[row], known]).tolist()
        starts = [place for place, each in enumerate(ids) if each == tokenizer.bos_id]
        pieces = [ids[start + 1 : end] for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
        shown = re.findall(r"^ +\d+\. .*, tokens [\d,]+ to [\d,]+ of [\d,]+: (.*)$", text, re.MULTILINE)
        expected = [both_ends(tokenizer.decode(piece), 100) for piece in pieces if piece]
        assert len(shown) == len(expected) and shown[:-1] == expected[:-1]
        assert shown[-1] == expected[-1] if len(known) else shown[-1][:30] == expected[-1][:30]


def test_a_run_is_named_and_its_own_settings_are_taken(
    here: Path, taken: dict[int, StepBatch], capsys: Captured
) -> None:
    write_texts(here / "texts")
    assert main(["train", *base(here), "run=it"]) == 0
    stage = here / "runs" / "it" / "base"
    files = {path: path.read_bytes() for path in stage.rglob("*") if path.is_file()}
    capsys.readouterr()
    for step in (1, STEPS):
        assert main(["doctor", "stage=base", "run=it", f"step={step}"]) == 0
        said = capsys.readouterr().out
        assert_shown(stage / "bundle", taken[step], step, said)
        assert "\n  1. texts.txt, document " in said
    assert main(["doctor", *base(here), f"step={STEPS}"]) == 0  # the same without the run
    assert capsys.readouterr().out.split("Row ", 1)[1] == said.split("Row ", 1)[1]
    assert {path: path.read_bytes() for path in stage.rglob("*") if path.is_file()} == files
    assert main(["doctor", "stage=base", "run=it", "step=1", "model.sequence_len=16"]) == 0, "what is given weighs more"
    assert "17 of 17 places" in capsys.readouterr().out


def test_conversations(here: Path, taken: dict[int, StepBatch], capsys: Captured) -> None:
    write_texts(here / "texts")
    assert main(["train", *base(here), "run=it"]) == 0
    taken.clear()
    settings = [text for text in sft_overrides(here) if not text.startswith(("max_steps", "mixture.joined"))]
    assert main(["train", *settings, "mixture.joined.share=0.6", f"max_steps={STEPS}", "run=it"]) == 0
    assert re.search(r"Joined: \d+ of the tasks' conversations are turns of \d+ longer ones", capsys.readouterr().out)
    assert main(["doctor", "stage=sft", "run=it", "step=2"]) == 0
    said = capsys.readouterr().out
    assert_shown(here / "runs" / "it" / "sft" / "bundle", taken[2], 2, said)
    place = r"(arithmetic|identity), conversation \d+"
    assert re.search(rf"1\. {place}( \+ {place})*, tokens 0 to \d+ of \d+: ", said)
    assert re.search(rf"{place} \+ {place}", said), "of a joined one each part is named"
    assert main(["doctor", "stage=sft", "run=it"]) == 0
    assert re.search(r"identity, \d+ of them in \d+ of several turns", capsys.readouterr().out)


def several_sources(here: Path) -> list[str]:
    for name in ("one", "two"):
        write_texts(here / name)
    other = here / "two" / "texts.txt"
    other.write_text(other.read_text(encoding="utf-8").upper(), encoding="utf-8")
    keys = ("name=local", "txt_document_chars=200")
    sources = [
        f"data.sources.{name}.{key}"
        for name, weight in (("one", 3), ("two", 1))
        for key in (*keys, f"path={here / name}", f"weight={weight}")
    ]
    return [*base(here, "data"), "data.name=mixture", *sources]


def shards_one_after_the_other(here: Path) -> list[str]:
    texts = (write_texts(here / "all") / "texts.txt").read_text(encoding="utf-8").split("\n\n")
    for number in range(3):
        column(here / "texts" / f"{number}.parquet", texts[number::3])
    return [*base(here), "data.shuffle=shards"]


@pytest.mark.parametrize("settings_of", [several_sources, shards_one_after_the_other])
def test_other_sources(here: Path, settings_of: object, taken: dict[int, StepBatch], capsys: Captured) -> None:
    assert callable(settings_of)
    settings: Sequence[str] = settings_of(here)
    assert main(["train", *settings, "run=it"]) == 0
    shutil.rmtree(here / "cache" / "rows")
    capsys.readouterr()
    assert main(["doctor", "stage=base", "run=it", "step=2"]) == 0
    said = capsys.readouterr().out
    assert_shown(here / "runs" / "it" / "base" / "bundle", taken[2], 2, said)
    if settings_of is several_sources:
        assert {"one", "two"} == set(re.findall(r"1\. (one|two)/texts\.txt, document", said))


def test_a_step_that_is_not_there_is_said(here: Path, capsys: Captured) -> None:
    write_texts(here / "texts")
    assert main(["doctor", *base(here), f"step={STEPS + 1}"]) == 2
    assert "step=4: the training has 3 steps; they are counted from 1" in capsys.readouterr().err
    assert main(["doctor", *base(here), "step=0"]) == 2
    assert "step=0: is below 1" in capsys.readouterr().err
    assert main(["doctor", *base(here)[1:], "stage=sft", "run=none", "step=1"]) == 2
    assert not (here / "runs").exists()
