"""The verb `export`."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.formats.huggingface_read import read_huggingface
from tests.formats.exports import make_bundle
from tests.tiny_run import make_tiny_run


def test_a_model_with_code_that_travels(
    golden: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(here / "home"))
    make_bundle(golden, here / "bundle", "2026")
    (here / "my hf").mkdir()  # an empty folder is as good as none
    assert main(["export", "bundle=bundle", "to=my hf"]) == 0
    said = capsys.readouterr().out
    assert "same most likely token            100.00%" in said
    assert "nanochat-pl import 'source=my hf' 'to=my hf-bundle'" in said
    assert sorted(path.name for path in here.iterdir()) == ["bundle", "my hf"]
    assert sorted(path.name for path in (here / "my hf").iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_nanochat_pl.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "trust_remote_code=True" in (here / "my hf" / "README.md").read_text(encoding="utf-8")
    assert read_huggingface(here / "my hf").stage.step == 7


def test_nanochats_layout(golden: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_bundle(golden, here / "bundle", "2026")
    assert main(["export", "bundle=bundle", "format=nanochat", "to=base"]) == 0
    assert "largest difference of two logits  0" in capsys.readouterr().out
    assert sorted(path.name for path in (here / "base").iterdir()) == ["README.md", "base_checkpoints", "tokenizer"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bundle=run/sft/bundle"], "to: is missing"),
        (["bundle=nothing", "to=out"], "bundle=nothing: there is no such folder"),
        (["bundle=run/sft/bundle", "to=run"], "to=run: is there already"),
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
