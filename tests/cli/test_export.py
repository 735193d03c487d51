"""The command `export`."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from nanochat_pl.bundle.bundle import save_bundle
from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.cli.main import main
from nanochat_pl.cli.train import compose_train
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import to_plain
from nanochat_pl.convert import parity
from nanochat_pl.convert.huggingface.read import read_huggingface
from nanochat_pl.convert.nanochat.read import read_nanochat
from nanochat_pl.convert.report import save_imported
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import resolve_hyperparameters
from nanochat_pl.optim.param_groups import build_optimizer
from tests.helpers.exports import make_bundle, tokenizer_of
from tests.helpers.tiny_run import make_tiny_run


def with_a_silent_person(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.CompletedProcess[str]]:
    """The process that compares gets a standard input that stays open and says nothing. Gives what it printed."""
    done, run = [], subprocess.run

    def run_with_a_pipe(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert options["stdin"] == subprocess.DEVNULL
        reading, writing = os.pipe()
        try:
            done.append(run(command, **{**options, "stdin": reading}))
        finally:
            os.close(reading)
            os.close(writing)
        return done[-1]

    monkeypatch.setattr(parity.subprocess, "run", run_with_a_pipe)
    return done


def without_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export is taken to be equal: no process that loads it is started."""
    monkeypatch.setattr("nanochat_pl.cli.export._say_parity", lambda parity: None)
    monkeypatch.setattr(
        "nanochat_pl.convert.export.measure", lambda *arguments, **options: parity.Parity("text", 1, 0.0, 1.0)
    )


@pytest.mark.slow
def test_a_model_with_code_that_travels(
    golden: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(here / "home"))
    make_bundle(golden, here / "bundle", "2026")
    (here / "my hf").mkdir()  # an empty folder is as good as none
    done = with_a_silent_person(monkeypatch)
    assert main(["export", "bundle=bundle", "to=my hf"]) == 0
    assert "custom code" not in done[0].stdout + done[0].stderr, "AutoTokenizer, too, asks whether code may run"
    said = capsys.readouterr().out
    assert "In bfloat16, whose numbers have 8 significant bits" in said
    assert re.search(r"positions with the same most likely token +100\.00%", said)
    assert "nanochat-pl import 'source=my hf' 'to=my hf-bundle'" in said
    assert sorted(path.name for path in here.iterdir()) == ["bundle", "my hf"]
    assert sorted(path.name for path in (here / "my hf").iterdir()) == [
        "README.md",
        "calculator.py",
        "chat_template.jinja",
        "config.json",
        "generate_with_calculator.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_nanochat_pl.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    card = (here / "my hf" / "README.md").read_text(encoding="utf-8")
    assert 'AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)' in card
    assert 'AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)' in card
    assert read_huggingface(here / "my hf").stage.step == 7


def test_nanochats_layout(golden: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_bundle(golden, here / "bundle", "2026")
    assert main(["export", "bundle=bundle", "format=nanochat", "to=base"]) == 0
    assert re.search(r"largest difference of two logits +0\n", capsys.readouterr().out)
    assert sorted(path.name for path in (here / "base").iterdir()) == ["README.md", "base_checkpoints", "tokenizer"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bundle=run/sft/bundle"], "to: is missing"),
        (["bundle=nothing", "to=out"], "bundle=nothing: there is no such folder"),
        (["bundle=run/sft/bundle", "to=run"], "to=run: is there already"),
        (["bundle=run/sft/bundle", "to=."], "to=.: must name the folder"),
        (["bundle=run/sft/bundle", "to="], "to='': is empty"),
        (["bundle=run/sft/bundle", "to=/"], "to=/: must name the folder"),
        (["bundle=run/sft/bundle", "to=run/.."], "must name the folder"),
        (["bundle=run", "to=out"], r"config.json: there is no such file"),
        (["bundle=run/sft/bundle", "to=out", "format=gguf"], "format='gguf': must be one of hf, nanochat"),
        (["to=out"], "runs: there are no runs"),
    ],
)
def test_mistakes(here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    make_tiny_run(here / "run")
    assert main(["export", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["run"]


def test_a_tokenizers_bundle(golden: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_bundle(here / "words", StageInfo(stage="tokenizer"), tokenizer=tokenizer_of(golden, 640))
    for layout in ("hf", "nanochat"):
        assert main(["export", "bundle=words", "to=out", f"format={layout}"]) == 2
        assert "words: a tokenizer's bundle has no model." in capsys.readouterr().err
    assert not (here / "out").exists()


def test_moments_that_do_not_fit_are_refused_before_anything_is_written(
    golden: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = save_imported(read_nanochat(golden / "nanochat_trained"), here / "bundle")
    moments = load_file(bundle / "optimizer.safetensors")
    moments["lm_head.weight.exp_avg"] = moments["lm_head.weight.exp_avg"][:3].clone()
    save_file(moments, bundle / "optimizer.safetensors")
    assert main(["export", "bundle=bundle", "format=nanochat", "to=a/b/out"]) == 2
    said = capsys.readouterr()
    assert "lm_head.weight.exp_avg has the shape (3, 64), not (1024, 64)" in said.err and "moments=false" in said.err
    assert "Writing" not in said.out and not (here / "a").exists()

    def fails_late(*arguments: Any) -> Any:
        raise UserError("broken")

    monkeypatch.setattr(parity, "_in_fresh_process", fails_late)
    assert main(["export", "bundle=bundle", "format=nanochat", "to=a/b/out", "moments=false"]) == 2
    assert "broken" in capsys.readouterr().err
    assert not (here / "a").exists(), "folders made for an export that failed stay"
    without_comparison(monkeypatch)
    assert main(["export", "bundle=bundle", "format=nanochat", "to=out", "moments=false"]) == 0
    assert list(here.rglob("model_*")) and list(here.rglob("optim_*")) == []


@pytest.mark.parametrize("older", [False, True])
def test_classic_muon_is_named(
    golden: Path, here: Path, older: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(golden, here / "bundle", "2026")
    settings = compose_train(["optim=classic_muon"]).config.optim
    optim = {"matrix_optimizer": "classic_muon"} if older else to_plain(settings)  # one key, before there were parts
    stage = replace(bundle.stage, settings={"optim": optim})
    hyper = resolve_hyperparameters(settings, width=64)
    optimizer = build_optimizer(bundle.net.named_parameters(), parameter_roles(bundle.net), hyper)
    save_bundle(here / "classic", stage, net=bundle.net, moments=optimizer.moments_by_name())
    without_comparison(monkeypatch)
    assert main(["export", "bundle=classic", "format=nanochat", "to=out"]) == 0
    assert "trained with classic Muon, which nanochat does not have" in capsys.readouterr().out
    assert list((here / "out").rglob("optim_*"))
