"""The notebook's cells run, in order, against a bundle made on the spot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanochat_pl.bundle import StageInfo, save_bundle
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.tokenizer import TokenizerSettings, train_tokenizer

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "explore_a_bundle.ipynb"


def cells(kind: str) -> list[str]:
    content: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a bundle of a tiny untrained model, and a few lines of metrics."""
    folder = tmp_path_factory.mktemp("runs") / "demo" / "sft"
    tokenizer = train_tokenizer(["Return the number of elements. " * 20], TokenizerSettings(vocab_size=280))
    settings = ModelSettings(depth=2, aspect_ratio=16, head_dim=16, sequence_len=128)
    net = GPT(resolve_model(settings, tokenizer.vocab_size, "float32")).materialise("cpu")
    init_weights(net, seed=0)
    save_bundle(folder / "bundle", StageInfo(stage="sft", step=7), net=net, tokenizer=tokenizer)
    (folder / "metrics.csv").write_text("step,train/loss,val/loss\n1,5.5,\n2,5.1,5.2\n", encoding="utf-8")
    return folder.parent


def test_the_file_is_a_notebook_without_outputs() -> None:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in content["cells"]]
    assert len(ids) == len(set(ids))
    for cell in content["cells"]:
        assert isinstance(cell["source"], list)
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_every_cell_runs(run: Path, tmp_path: Path) -> None:
    """In a process of its own, as a notebook would: one namespace, cell after cell."""
    program = tmp_path / "cells.py"
    program.write_text("\n\n".join(cells("code")), encoding="utf-8")
    environment = {**os.environ, "NANOCHAT_PL_RUN": str(run), "MPLBACKEND": "Agg", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, encoding="utf-8", env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "sft, step 7" in done.stdout
    assert "<|assistant_start|>" in done.stdout
    assert "Spell the word: apple" in done.stdout
