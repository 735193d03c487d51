"""The notebook's cells run, in order, against a bundle made on the spot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.tiny_run import make_tiny_run

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "explore_a_bundle.ipynb"


def cells(kind: str) -> list[str]:
    content: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def test_the_file_is_a_notebook_without_outputs() -> None:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in content["cells"]]
    assert len(ids) == len(set(ids))
    for cell in content["cells"]:
        assert isinstance(cell["source"], list)
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_every_cell_runs(tmp_path: Path) -> None:
    """In a process of its own, as a notebook would: one namespace, cell after cell."""
    run = make_tiny_run(tmp_path / "runs" / "demo")
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
