"""The stage mid: what it starts from, what it learns of a conversation, and who starts from it."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat_pl import load_bundle
from nanochat_pl.bundle.bundle import load_moments
from nanochat_pl.cli.main import main
from nanochat_pl.cli.pipeline import is_finished, steps_of
from nanochat_pl.cli.train import compose_train, place_of
from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.common.errors import UserError
from nanochat_pl.data.packing.rows import Rows
from nanochat_pl.data.sources.run_corpus import RunCorpus
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.mixture import Mixture, build_mixture
from nanochat_pl.training.config import StageSettings
from nanochat_pl.training.device import prepare_machine
from nanochat_pl.training.stage_data.conversations import prepare_conversations
from nanochat_pl.training.stage_data.inherit import inherited
from nanochat_pl.training.stages.registry import StageContext, StageData
from tests.training.conftest import same_weights, sft_overrides, start_run, weights_of

STILL = ("max_steps=2", "schedule.initial_lr_fraction=0", "evaluation.every_steps=0")


def chat_overrides(place: Path, stage: str) -> list[str]:
    return [f"stage={stage}" if text == "stage=sft" else text for text in sft_overrides(place)]


def prepared_of(place: Path, overrides: list[str]) -> tuple[StageData, Mixture]:
    """What a stage trains with, and the conversations."""
    composed = compose_train(overrides)
    folder = place_of(composed)
    config = inherited(composed.config, folder, composed.given)
    mixture = build_mixture(config.mixture, "train", TaskContext(place / "cache"))
    cache = place / "cache"
    context = StageContext(config, folder, cache, prepare_machine(config), RunCorpus(cache))
    return prepare_conversations(context), mixture


def column(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def chain(place: Path) -> Path:
    """A run that went through all stages; sft and mid learn nothing new, so that their start can be seen."""
    folder = start_run(place, "chain", "sft")
    for stage in ("mid", "sft"):
        assert main(["train", "run=chain", *chat_overrides(place, stage), *STILL]) == 0
    return folder


def test_every_stage_starts_from_the_one_before(chain: Path) -> None:
    assert same_weights(weights_of(chain, "base"), weights_of(chain, "mid"))
    assert same_weights(weights_of(chain, "mid"), weights_of(chain, "sft"))
    mid, sft = (load_bundle(chain / name / "bundle").stage for name in ("mid", "sft"))
    assert [parent["stage"] for parent in mid.parents] == ["base"]
    assert [parent["stage"] for parent in sft.parents] == ["base", "mid"]
    assert mid.plan["matrix_lr"]["overridden_by"] == "inherited from base"
    assert sft.plan["matrix_lr"]["overridden_by"] == "inherited from mid"
    assert sft.plan["matrix_lr"]["value"] == mid.plan["matrix_lr"]["value"]
    for group in ("model", "tokenizer", "data"):
        assert sft.settings[group] == mid.settings[group] == load_bundle(chain / "base/bundle").stage.settings[group]
    assert sft.settings["stage"]["parent"] == "mid", "what null meant is written down"


def test_mid_begins_with_the_moments_of_base(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    loaded = load_moments(place / "runs/whole/base/bundle")

    def note(optimizer: object, moments: dict[str, torch.Tensor]) -> None:
        given.update(moments)

    monkeypatch.setattr("nanochat_pl.optim.muon_adamw.MuonAdamW.load_moments", note)
    start_run(place, "warm", "sft")
    assert main(["train", "run=warm", *chat_overrides(place, "mid"), "max_steps=1"]) == 0
    assert given.keys() == loaded.keys() and all(torch.equal(given[name], loaded[name]) for name in loaded)


def test_its_schedule_is_flat_and_falls_to_nothing_in_the_last_fifth(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start_run(place, "slope", "sft")
    assert main(["train", "run=slope", *chat_overrides(place, "mid"), "max_steps=10"]) == 0
    assert "Inherited from base: " in capsys.readouterr().out
    assert column(place / "runs/slope/mid", "train/lr_multiplier") == pytest.approx([1.0] * 9 + [0.5])


def test_all_of_a_conversation_is_learnt(place: Path, chain: Path) -> None:
    """Every token that stands in a row is a target, bos between two conversations too; padding is none."""
    prepared, _ = prepared_of(place, [*chat_overrides(place, "mid"), "run=chain"])
    for rows in (prepared.rows, prepared.validation.sources[""].rows):  # type: ignore[union-attr]
        numbers = np.arange(min(50, len(rows)))
        inputs, targets = rows.read(numbers)
        for row, (given, wanted) in enumerate(zip(inputs, targets, strict=True)):
            filled = sum(1 + len(piece.ids) for piece in rows.address(row))  # type: ignore[union-attr]
            assert (wanted[: filled - 1] != IGNORE_INDEX).all() and (wanted[filled - 1 :] == IGNORE_INDEX).all()
            assert np.array_equal(wanted[: filled - 1], np.append(given[1:], wanted[-1])[: filled - 1])


def test_what_is_learnt_can_be_said(place: Path, chain: Path) -> None:
    """Mid as sft is by itself, and sft as mid is."""

    def targets(stage: str, *more: str) -> np.ndarray:
        prepared, _ = prepared_of(place, [*chat_overrides(place, stage), "run=chain", *more])
        return prepared.rows.read(np.arange(20))[1]

    of_all, of_answers = targets("mid"), targets("sft")
    assert (of_answers != IGNORE_INDEX).sum() < (of_all != IGNORE_INDEX).sum()
    assert np.array_equal(targets("mid", "stage.loss_mask=assistant"), of_answers)
    assert np.array_equal(targets("sft", "stage.loss_mask=all"), of_all)


def test_a_run_older_than_the_key_goes_on_as_it_was(
    place: Path, chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = chain / "sft/config.yaml"
    lines = record.read_text(encoding="utf-8").splitlines(keepends=True)
    older = [line for line in lines if "loss_mask" not in line]
    assert len(older) == len(lines) - 1
    record.write_text("".join(older), encoding="utf-8")
    arguments = ["train", "run=chain", *chat_overrides(place, "sft"), *STILL]
    assert main(arguments) == 0
    assert "is finished" in capsys.readouterr().out
    assert main([*arguments, "stage.loss_mask=all"]) == 2
    assert "stage.loss_mask=all: " in capsys.readouterr().err


def test_sft_goes_on_from_what_it_was_begun_with(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mid stage that is finished later would else change the parent of an sft stage that is half-way."""
    folder = start_run(place, "half", "sft")
    shutil.copytree(place / "runs/whole/sft", folder / "sft")
    shutil.copytree(place / "runs/chain/mid", folder / "mid")
    arguments = ["train", "run=half", *sft_overrides(place)]
    assert main(arguments) == 0
    assert "is finished" in capsys.readouterr().out
    assert main([*arguments, "stage.parent=mid"]) == 2
    assert "stage.parent=mid: " in capsys.readouterr().err
    shutil.rmtree(folder / "sft" / "bundle")
    (folder / "sft" / "finished.json").unlink()
    assert main(arguments) == 0
    assert [each["stage"] for each in load_bundle(folder / "sft/bundle").stage.parents] == ["base"]


def test_the_parent_can_be_said(place: Path, chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "run=chain", "resume=never", *sft_overrides(place), "stage.parent=base", "max_steps=1"]) == 0
    out = capsys.readouterr().out
    assert f"sft starts from {chain / 'base' / 'bundle'} (trained for 40 steps)." in out
    assert "Inherited from base: " in out
    assert main(["train", "run=whole", "resume=never", *sft_overrides(place), "stage.parent=mid", "max_steps=1"]) == 2
    assert "the mid stage to start from is not there" in capsys.readouterr().err
    (place / "runs" / "whole" / "mid").mkdir()  # as while it trains
    assert main(["train", "run=whole", "resume=never", *sft_overrides(place), "stage.parent=mid", "max_steps=1"]) == 2
    assert "the mid stage to start from is not finished" in capsys.readouterr().err
    (place / "runs" / "whole" / "mid").rmdir()


def test_a_pipeline_knows_it(place: Path, chain: Path) -> None:
    experiment = place / "chain.yaml"
    experiment.write_text("pipeline: [mid, sft]", encoding="utf-8")
    for step in steps_of([f"experiment={experiment}", "run=chain", *sft_overrides(place)[1:], *STILL]):
        assert is_finished(step, step.compose(), chain), step.name


def test_the_doctor_looks_at_it(place: Path, chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "run=chain", *chat_overrides(place, "mid"), *STILL, "step=1"]) == 0
    out = capsys.readouterr().out
    assert "Row 0: " in out and ", 32 targets." in out, "a full row of 32 inputs, all of them learnt"


def test_the_mask_reaches_the_loss(place: Path) -> None:
    """Elsewhere a refactor lost it: the model was fine-tuned on the questions as well, and no metric looked odd."""
    start_run(place, "mask", "sft")
    arguments = [*sft_overrides(place), "run=mask", "max_steps=1", "model.compute_dtype=float32"]
    prepared, mixture = prepared_of(place, arguments)
    bundle = load_bundle(place / "runs/whole/base/bundle", dtype="float32")
    tokenizer = bundle.tokenizer
    assert tokenizer is not None and isinstance(prepared.rows, Rows)
    inputs, targets = prepared.rows.read(np.arange(8))
    for row, wanted in enumerate(targets):
        trained: list[int] = []  # of the row, from its first place
        for piece in prepared.rows.address(row):
            ids, mask = tokenizer.render_conversation(mixture[piece.document], len(wanted) + 1)
            trained += [token if learnt else IGNORE_INDEX for token, learnt in zip(ids, mask, strict=True)]
        trained += [IGNORE_INDEX] * (len(wanted) + 1 - len(trained))
        assert wanted.tolist() == trained[1:]
    assert 0 < (targets != IGNORE_INDEX).mean() < 0.9
    assert main(["train", *arguments]) == 0
    logits = bundle.net(torch.as_tensor(inputs)).float()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.as_tensor(targets).flatten(), ignore_index=-1)
    logged = column(place / "runs/mask/sft", "train/loss")
    assert logged == pytest.approx([nats.item()], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "parent", "said"),
    [
        ("mid", "tokenizer", "the stage mid starts from base"),
        ("mid", "mid", "the stage mid starts from base"),
        ("sft", "tokenizer", "the stage sft starts from base or mid"),
        ("base", "mid", "the stage base starts from tokenizer"),
        ("tokenizer", "base", "the stage tokenizer starts from nothing"),
    ],
)
def test_parents_that_cannot_be(name: str, parent: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        StageSettings(name=name, parent=parent)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tokenizer", "base"])
def test_a_stage_of_documents_has_no_loss_mask(name: str) -> None:
    with pytest.raises(UserError, match=rf"loss_mask=all: the stage {name} has no conversations"):
        StageSettings(name=name, loss_mask="all")  # type: ignore[arg-type]
