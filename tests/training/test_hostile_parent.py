"""A parent's stage.json is untrusted data: whatever stands in it, fine-tuning refuses it with one clear error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nanochat_pl.cli.main import main
from tests.training.conftest import sft_overrides


@pytest.fixture(scope="module")
def copied(place: Path) -> Path:
    """A run with the stages tokenizer and base, to be spoilt."""
    for stage in ("tokenizer", "base"):
        shutil.copytree(place / "runs" / "whole" / stage, place / "runs" / "spoilt" / stage)
    return place / "runs" / "spoilt"


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (["plan", "matrix_lr", "value"], "fast", "plan.matrix_lr='fast': must be a number."),
        (["plan", "weight_decay", "value"], None, "plan.weight_decay=None: must be a number."),
        (["plan", "scalar_lr", "value"], -1.0, "plan.scalar_lr=-1.0: is below 0."),
        (["plan", "embedding_lr", "value"], [0.1], "plan.embedding_lr=[0.1]: must be a number."),
        (["plan", "smear_lr", "value"], 10**400, "must be a number."),
        (["plan", "total_batch_tokens", "value"], "1", "plan.total_batch_tokens='1': must be a whole number."),
        (["plan", "total_batch_tokens", "value"], 0, "plan.total_batch_tokens=0: is below 1."),
        (["plan", "total_batch_tokens"], 7, "must be a group of settings"),
        (["plan"], {}, "plan.total_batch_tokens: is missing."),
        (["settings", "model"], 5, "settings.model=5: must be a group of settings."),
        (["settings", "model", "depth"], "deep", "settings.model.depth='deep': must be a whole number."),
    ],
)
def test_a_hostile_value_is_one_error_before_any_work(
    keys: list[str], value: Any, said: str, place: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that was a text ended in a traceback, after the conversations had been rendered."""
    path = copied / "base" / "bundle" / "stage.json"
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    owner = content
    for key in keys[:-1]:
        owner = owner[key]
    owner[keys[-1]] = value
    try:
        path.write_text(json.dumps(content), encoding="utf-8")
        assert main(["train", "run=spoilt", *sft_overrides(place)]) == 2
    finally:
        path.write_text(text, encoding="utf-8")
    out, err = capsys.readouterr()
    assert said in err and "stage.json" in err
    assert "Traceback" not in err and "Conversations:" not in out
    assert not (copied / "sft").exists()
