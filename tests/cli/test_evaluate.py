"""The verb `evaluate`: what it reads on whose word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nanochat_pl.bundle import StageInfo, load_bundle, save_bundle
from nanochat_pl.cli.evaluate_settings import EvaluateConfig
from nanochat_pl.cli.evaluate_suites import data_of
from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.settings import to_plain
from nanochat_pl.data.sources import DataSettings
from tests.tiny_run import make_tiny_run


def test_files_that_a_strangers_bundle_names_are_not_read(tmp_path: Path) -> None:
    """They were, and a figure told something of a text that nobody had given."""
    bundle = load_bundle(make_tiny_run(tmp_path) / "sft" / "bundle")
    data = DataSettings(name="local", path="/etc/passwd", text_column="words")
    bundle.stage.settings["data"] = to_plain(data)
    with pytest.raises(UserError, match=r"'/etc/passwd' .*\n.*data_path=PATH; or leave it out, suites="):
        data_of(bundle, EvaluateConfig(bundle="x"))
    assert data_of(bundle, EvaluateConfig(run="mine")) == data
    assert data_of(bundle, EvaluateConfig(bundle="x", data_path="here")) == replace(data, path="here")
    bundle.stage.settings["data"] = to_plain(DataSettings())
    assert data_of(bundle, EvaluateConfig(bundle="x", data_path="here")).name == "local"
    assert data_of(bundle, EvaluateConfig(bundle="x")) == DataSettings()


def test_a_bundle_without_a_tokenizer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = load_bundle(make_tiny_run(here / "full") / "sft" / "bundle")
    save_bundle(here / "bare", StageInfo(stage="base"), net=bundle.net)
    assert main(["evaluate", "bundle=bare", "to=out", "suites=[bpb]"]) == 2
    assert "bare: has no tokenizer" in capsys.readouterr().err
