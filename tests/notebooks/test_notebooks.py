"""Every notebook is stored without outputs, and its cells run, in order, against a run made on the spot."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.forked import Forked

FOLDER = Path(__file__).parents[2] / "notebooks"
# What each prints, and how many figures it draws of the tiny run.
SAYS = {
    "inspect_a_checkpoint": ("base, step 3", "value_embedding", "smear_lambda:"),
    "training_curves": ("bits per byte ± 0.0100", "flops_budget=4000000000000.0", "flops1e+12-0, base: finished"),
    "token_inspector": ("perplexity", "bits per byte"),
    "rl_rollouts": ("answers are kept of 3 steps, 1 to 3", "16 answers to 4 questions"),
    "scaling_laws": ("13 base stages in", "tokens per parameter", "parameters ∝ FLOPs^0.5", "exponent"),
    "tokenizer": ("290 ids: 256 bytes, 25 merges, 9 special", "GPT-2"),
    "data_doctor": ("3 steps of", "exact copies in training"),
}
COUNT_FIGURES = "\n\nprint('figures:', len(plt.get_fignums()))\n"


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def test_every_notebook_is_tried() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_a_notebook_is_stored_without_outputs(name: str) -> None:
    content = read(name)
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in content["cells"]]
    assert len(ids) == len(set(ids))
    for cell in content["cells"]:
        assert isinstance(cell["source"], list)
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize("name", SAYS)
def test_every_code_cell_is_introduced_and_the_first_names_the_run(name: str) -> None:
    cells = read(name)["cells"]
    assert [cell["cell_type"] for cell in cells[:2]] == ["markdown", "code"]
    assert "NANOCHAT_PL_RUN" in "".join(cells[0]["source"]) and "NANOCHAT_PL_RUN" in "".join(cells[1]["source"])


@pytest.mark.slow
def test_every_cell_runs(run: Path, tmp_path: Path) -> None:
    """Each in a process of its own, as in a notebook: one namespace, cell after cell. All in one test: the run that
    they read is made once, by one worker."""
    environment = {**os.environ, "NANOCHAT_PL_RUN": str(run), "MPLBACKEND": "Agg", "PYTHONIOENCODING": "utf-8"}
    programs = {}
    for name in SAYS:
        cells = ["".join(cell["source"]) for cell in read(name)["cells"] if cell["cell_type"] == "code"]
        path = tmp_path / f"{name}.py"
        path.write_text("\n\n".join(cells) + COUNT_FIGURES, encoding="utf-8")
        programs[name] = Forked([str(path)], cwd=tmp_path, env=environment, capture=True)
    for name, program in programs.items():
        code, (printed, errors) = program.wait(240), program.printed()
        assert code == 0, f"{name}: {errors}"
        assert [text for text in SAYS[name] if text not in printed] == [], f"{name}: {printed}"
        assert int(printed.rpartition("figures: ")[2]) >= 1, name
        assert "Glyph" not in errors, f"{name}: {errors}"  # every sign is one of the font
