"""A run and a bundle that commit 6b9f64f wrote: they are gone on with, evaluated and talked to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nanochat_pl.cli.main import main

MADE = Path(__file__).with_name("run_of_6b9f64f")
# As they were typed there.
TYPED = (MADE / "runs/finished/base/overrides.txt").read_text(encoding="utf-8").split()


@pytest.fixture
def older(here: Path) -> Path:
    shutil.copytree(MADE, here, dirs_exist_ok=True)
    return here


def test_a_run_that_was_stopped_is_gone_on_with(older: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its text is cut at other places now, and that alone is refused: no key of its settings, nothing of its file."""
    command = ["train", *TYPED, "run=stopped", f"paths.cache={older / 'cache'}"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "was written with data 0fc9c58af385" in said
    assert main([*command, "resume_with_changes=true"]) == 0
    said = capsys.readouterr()
    assert "going on after step 4" in said.out + said.err
    assert (older / "runs/stopped/base/bundle/model.safetensors").exists()
    assert len((older / "runs/stopped/base/metrics.csv").read_text(encoding="utf-8").splitlines()) == 1 + 8


def test_a_bundle_is_evaluated_and_talked_to(older: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["run=finished", f"paths.cache={older / 'cache'}"]
    assert main(["evaluate", *places, "suites=[bpb]", "accelerator=cpu"]) == 0
    assert "bits per byte: 4.4" in capsys.readouterr().out
    assert main(["chat", *places, "prompt=hi", "max_tokens=4", "accelerator=cpu"]) == 0
    assert main(["report", "run=finished"]) == 0
