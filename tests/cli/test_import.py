"""`nanochat-pl import` as a person meets it."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest

from nanochat_pl import load_bundle
from nanochat_pl.cli.main import main
from nanochat_pl.training.stage_data.inherit import inherited
from tests.helpers.exports import make_bundle, write
from tests.helpers.nanochat_copies import copy, only


def test_a_checkpoint_becomes_a_bundle(golden: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", f"source={golden / 'nanochat_base'}", "to=mine"]) == 0
    shown = capsys.readouterr().out
    assert "nanochat, architecture nanochat (by smear_gate.weight)." in shown
    assert "Without optimizer moments." in shown
    assert "nanochat-pl chat bundle=mine" in shown
    assert load_bundle(here / "mine").tokenizer is not None
    assert (here / "mine" / "certificate.md").is_file()
    assert main(["chat", "bundle=mine", "prompt=hello", "max_tokens=3"]) == 0


def test_a_checkpoint_becomes_a_stage_of_a_run(golden: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", f"source={golden / 'nanochat_trained'}", "run=gold"]) == 0
    assert main(["runs"]) == 0
    assert "gold  base   finished    13" in capsys.readouterr().out
    assert main(["import", f"source={golden / 'nanochat_trained'}", "run=gold"]) == 2
    assert "runs/gold/base: is there already." in capsys.readouterr().err


def test_a_later_stage_takes_the_settings_of_an_imported_one(golden: Path, here: Path) -> None:
    from nanochat_pl.cli.train import compose_train, place_of

    assert main(["import", f"source={golden / 'nanochat_trained'}", "run=gold"]) == 0
    composed = compose_train(["stage=sft", "run=gold"])
    config = inherited(composed.config, place_of(composed), set())
    assert (config.model.depth, config.model.head_dim, config.tokenizer.vocab_size) == (4, 16, 1000)


@pytest.mark.slow
def test_fine_tuning_starts_from_an_imported_run(golden: Path, here: Path) -> None:
    """From its weights, its moments and its learning rates."""
    assert main(["import", f"source={golden / 'nanochat_trained'}", "run=gold"]) == 0
    others = ("word_problems", "spelling", "letter_counting", "documentation", "out_of_scope")
    small = [*(f"mixture.tasks.{name}=null" for name in others), "mixture.tasks.arithmetic.size=60"]
    quick = ["max_steps=2", "evaluation.num_rows=4", "trainer.accelerator=cpu", "trainer.compile=false"]
    assert (
        main(["train", "stage=sft", "run=gold", "model.compute_dtype=float32", "paths.cache=cache", *small, *quick])
        == 0
    )
    stage = json.loads((here / "runs/gold/sft/bundle/stage.json").read_text(encoding="utf-8"))
    assert stage["parents"][0]["stage"] == "base" and stage["parents"][0]["step"] == 13
    assert stage["plan"]["matrix_lr"]["value"] == pytest.approx(0.014)
    assert stage["origin"] == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["to=x"], "source: is missing"),
        (["source=."], "to: a folder for the bundle, or run: the name of a new run; give one of them."),
        (["source=.", "to=x", "run=y"], "give one of them"),
        (["source=nowhere", "to=x"], "source=nowhere: there is no such folder."),
        (["source=.", "to=x"], "has no checkpoint of nanochat in it"),
        (["source=.", "to=full"], "to=full: is there already."),
        (["source=bundle", "to=x"], "source=bundle: is a bundle already."),
        (["source=.", "to=x", "era=nanochat_2027"], "era"),
        (["source=.", "run=../x"], "is not a valid run name"),
    ],
)
def test_mistakes_are_said(arguments: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "full").mkdir()
    (here / "full" / "file").touch()
    (here / "bundle").mkdir()
    (here / "bundle" / "stage.json").touch()
    before = sorted(here.iterdir())
    assert main(["import", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert sorted(here.iterdir()) == before


def test_a_hostile_tokenizer_is_one_line(golden: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Hostile:
        def __reduce__(self) -> object:
            return os.system, ("touch was-run",)

    source = copy(golden, "nanochat_base", here)
    only(source, "tokenizer.pkl").write_bytes(pickle.dumps(Hostile()))
    assert main(["import", "source=nanochat_base", "to=mine"]) == 2
    out, err = capsys.readouterr()
    assert err.count("error:") == 1 and "posix.system" in err and "Traceback" not in err + out
    assert [path.name for path in here.iterdir()] == ["nanochat_base"]


def test_two_checkpoints_are_asked_about(golden: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copy(golden, "era_oct2025", here)
    for pattern in ("model_*.pt", "meta_*.json"):
        path = only(source, pattern)
        path.with_name(path.name.replace("3", "5")).write_bytes(path.read_bytes())
    assert main(["import", "source=era_oct2025", "to=mine"]) == 2
    assert "tag=era_oct2025 step=3; tag=era_oct2025 step=5" in capsys.readouterr().err
    assert main(["import", "source=era_oct2025", "to=mine", "step=5", "stage=mid"]) == 0
    stage = json.loads((here / "mine" / "stage.json").read_text(encoding="utf-8"))
    assert (stage["stage"], stage["step"]) == ("mid", 5)


def test_what_is_in_the_way_is_said_before_a_checkpoint_is_read(
    golden: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a large model takes minutes."""

    def read(*arguments: object, **options: object) -> object:
        raise AssertionError("was read")

    monkeypatch.setattr("nanochat_pl.cli._import.read_nanochat", read)
    (here / "runs" / "gold" / "base").mkdir(parents=True)
    (here / "link").symlink_to(here)
    for key, said in (
        ("run=gold", "runs/gold/base: is there already"),
        ("to=.", "to=.: must name the folder"),
        ("to=", "to='': is empty"),
        ("to=/", "to=/: must name the folder"),
        ("to=link", "to=link: is a link"),
    ):
        assert main(["import", f"source={golden / 'nanochat_trained'}", key]) == 2
        assert said in capsys.readouterr().err


def test_folders_made_for_an_import_that_fails_go_again(
    golden: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanochat_pl.bundle.tensors.free_bytes", lambda path: 10)
    for key in ("to=a/b/c", "run=gold"):
        assert main(["import", f"source={golden / 'era_oct2025'}", key]) == 2
        assert "to=… (import and export)" in capsys.readouterr().err
        assert list(here.iterdir()) == []


def test_an_import_of_transformers_as_a_run(golden: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(make_bundle(golden, here / "bundle", "2026"), here / "hf")
    for code in (0, 2):
        assert main(["import", "source=hf", "run=gold"]) == code
    assert "runs/gold/base: is there already." in capsys.readouterr().err


def test_a_model_of_others_becomes_the_stage_that_is_said(
    golden: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was the stage "imported", which nothing could start from."""
    write(make_bundle(golden, here / "bundle", "2025_10"), here / "hf")
    config = json.loads((here / "hf" / "config.json").read_text(encoding="utf-8"))
    mine = config.pop("nanochat_pl")
    (here / "hf" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["import", "source=hf", "run=theirs"]) == 2
    assert "hf: does not say which stage of a run it is." in capsys.readouterr().err
    assert main(["import", "source=hf", "run=theirs", "stage=sft"]) == 0
    assert load_bundle(here / "runs" / "theirs" / "sft" / "bundle").stage.stage == "sft"
    assert main(["import", "source=hf", "to=other"]) == 0, "a bundle has no place in a run"
    keys = ["tag=d99", "step=7", "era=nanochat", "moments=false", "tokenizer=none"]
    assert main(["import", "source=hf", "to=x", *keys]) == 2
    said = capsys.readouterr().err
    assert all(f"{key.partition('=')[0]}: has no meaning for a folder of transformers." in said for key in keys)
    (here / "hf" / "config.json").write_text(json.dumps({**config, "nanochat_pl": mine}), encoding="utf-8")
    for place in ("run=x", "to=x"):
        assert main(["import", "source=hf", place, "stage=sft"]) == 2
        assert "config.json says that it is base." in capsys.readouterr().err
