"""An older architecture through the stages: planned, checked, trained, fine-tuned, and never mixed up with another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nanochat_pl import load_bundle
from nanochat_pl.cli.main import main
from nanochat_pl.cli.train import compose_train, place_of
from nanochat_pl.training.stage_data.inherit import inherited
from tests.training.conftest import sft_overrides, start_run, tiny_overrides, weights_of

# More than the width of a bundle tells: windows, rotary base, value gates; and first weights of its own.
ERA = [
    "model=nanochat_2026_02",
    "model.num_kv_heads=1",
    "model.depth=3",
    "model.window_pattern=SL",
    "model.init.wte_std=0.5",
    "optim=classic_muon",
]


@pytest.fixture(scope="module")
def february(place: Path) -> Path:
    """A finished base stage of the older architecture."""
    assert main(["train", "run=february", *tiny_overrides(place), *ERA, "max_steps=5"]) == 0
    return place / "runs" / "february"


def fine_tune(place: Path, *overrides: str) -> int:
    return main(["train", "run=february", *sft_overrides(place), "max_steps=2", *overrides])


@pytest.mark.parametrize("era", ["nanochat_2026_02", "nanochat_2025_10"])
def test_an_older_architecture_is_planned_and_checked(
    era: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", f"model={era}", "model.depth=20"]) == 0
    assert "parameters_total" in capsys.readouterr().out
    assert main(["train", f"model=[{era},tiny]", "data=python_docs", "max_steps=3", "check_only=true"]) == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_first_weights_are_those_of_the_settings(place: Path, february: Path) -> None:
    """One step with learning rates of nothing: what the stage begins with."""
    still = ["max_steps=1", *(f"optim.{name}_lr=0" for name in ("matrix", "embedding", "unembedding", "scalar"))]
    assert main(["train", "run=still", *tiny_overrides(place), *ERA, *still]) == 0
    weights = weights_of(place / "runs" / "still", "base")
    assert weights["transformer.wte.weight"].std().item() == pytest.approx(0.5, rel=0.05)
    assert weights["resid_lambdas"].tolist() == [1.0] * 3 and not weights["transformer.h.0.attn.ve_gate.weight"].any()
    resolved = json.loads((february / "base" / "bundle" / "config.json").read_text(encoding="utf-8"))
    assert not any("2026" in str(value) for value in resolved.values()), "numbers, and no names of generations"


def test_the_architecture_goes_on_to_the_next_stage(place: Path, february: Path) -> None:
    """Elsewhere the window pattern was lost there, and the next stage took the default of the day."""
    assert fine_tune(place) == 0
    base, sft = (load_bundle(february / stage / "bundle") for stage in ("base", "sft"))
    assert sft.config == base.config
    assert sft.config.windows == (16, 32, 32) and sft.config.rotary_base == 10_000.0
    assert sft.stage.settings["model"] == base.stage.settings["model"]
    ids = torch.arange(20)[None]
    assert torch.isfinite(sft.net(ids)).all()


def test_keys_that_contradict_the_parent_are_refused(
    place: Path, february: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in february.parent.iterdir())
    given = ("model=nanochat", "model.init.x0_last=0.3")
    assert fine_tune(place, "resume=never", *given) == 2
    error = capsys.readouterr().err
    for line in (
        "model.window_pattern=SSSL: the base stage was trained with SL",
        "model.rotary_base=100000.0: the base stage was trained with 10000.0",
        "model.init.wte_std=0.8: the base stage was trained with 0.5",
        "model.init.x0_last=0.3: the base stage was trained with 0.1",
    ):
        assert line in error
    assert "softcap" not in error, "only what differs is named"
    assert sorted(path.name for path in february.parent.iterdir()) == before


def test_a_key_that_is_newer_than_the_bundle_has_its_default(
    place: Path, february: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was not compared at all, and what was given for it had no effect."""
    path = february / "base" / "bundle" / "stage.json"
    text = path.read_text(encoding="utf-8")
    older = json.loads(text)
    del older["settings"]["model"]["softcap"]
    try:
        path.write_text(json.dumps(older), encoding="utf-8")
        assert fine_tune(place, "resume=never", "model.softcap=20") == 2
    finally:
        path.write_text(text, encoding="utf-8")
    assert "model.softcap=20.0: the base stage was trained with 15.0" in capsys.readouterr().err


def test_a_later_stage_chooses_anew_whether_documents_are_kept_apart(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundle says which function was trained, and another stage inherits it."""
    folder = start_run(place, "apart", "sft")
    typed = ["train", "run=apart", *sft_overrides(place), "max_steps=2", "evaluation.every_steps=0"]
    assert main([*typed, "model.restart_positions=true"]) == 2
    assert "restart_positions=true: needs document_mask=true" in capsys.readouterr().err
    assert main([*typed, "model.document_mask=true", "model.restart_positions=true"]) == 0
    base, sft = (load_bundle(folder / stage / "bundle") for stage in ("base", "sft"))
    assert base.config.document_start_id is None and not base.config.restart_positions
    assert sft.config.document_start_id == sft.tokenizer.bos_id and sft.config.restart_positions
    composed = compose_train(["stage=rl", "run=apart", f"paths.runs={folder.parent}", f"paths.cache={place / 'cache'}"])
    answering = inherited(composed.config, place_of(composed), composed.given)
    assert answering.model.document_mask and answering.model.restart_positions
