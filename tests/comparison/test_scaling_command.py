"""`nanochat-pl scaling` on the ledger and the plans of a ladder, and its page."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.ledger import append
from tests.comparison.fake_runs import entry_of

HEAD_SHARE = 0.25


def add(runs: Path, name: str, size: float, tokens: float, bpb: float, budget: float | None = None) -> None:
    plan = {
        "depth": round((size / 2e4) ** (1 / 3)),
        "parameters_transformer_matrices": (1 - HEAD_SHARE) * size,
        "parameters_lm_head": HEAD_SHARE * size,
        "parameters_total": 2 * size,
        "flops_per_token": 6 * size,
    }
    folder = runs / name / "base"
    folder.mkdir(parents=True)
    values = {key: {"value": value, "formula": "", "inputs": {}} for key, value in plan.items()}
    (folder / "plan.json").write_text(json.dumps(values), encoding="utf-8")
    changed = {"model.depth": plan["depth"], **({"flops_budget": budget} if budget else {})}
    append(runs, entry_of(name, 42, bpb, changed, tokens=int(tokens), flops=6 * size * tokens))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Budgets with optima at sizes ∝ C^0.5; and a power law of the size with the floor 0.6 and the exponent 0.3."""
    for budget in (1e15, 1e16, 1e17):
        for step in (-1, -0.5, 0, 0.5, 1):
            size = 1e6 * (budget / 1e15) ** 0.5 * math.exp(step)
            add(tmp_path, f"iso-{budget:.0e}-{step}", size, budget / 6 / size, 1.5 + 0.05 * step**2, budget)
    for depth in range(4, 16, 2):
        size = 2e4 * depth**3
        add(tmp_path, f"mini-d{depth}", size, 8 * size, 0.6 + (size / 1e6) ** -0.3)
    return tmp_path


def test_best_sizes_and_exponents(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "iso-*", f"paths.runs={runs}", f"to={tmp_path / 'page'}"]) == 0
    out = capsys.readouterr().out
    assert "Best parameters ∝ FLOPs^0.5 (0.5 … 0.5), best tokens ∝ FLOPs^0.5 (0.5 … 0.5), of 3 budgets." in out
    page = (tmp_path / "page" / "scaling.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "<script" not in page
    found = json.loads((tmp_path / "page" / "scaling.json").read_text(encoding="utf-8"))
    assert [optimum["parameters"]["value"] for optimum in found["fit"]["optima"]] == pytest.approx([1e6, 10**6.5, 1e7])
    assert len(found["points"]) == 15


@pytest.mark.parametrize(("counted", "factor"), [("scaling", 1.0), ("matrices", 0.75), ("all", 2.0)])
def test_which_parameters_count(runs: Path, capsys: pytest.CaptureFixture[str], counted: str, factor: float) -> None:
    assert main(["scaling", "iso-1e+15*", f"counted={counted}", f"paths.runs={runs}"]) == 0
    assert f" {1e6 * factor:.3g} " in capsys.readouterr().out


@pytest.mark.parametrize("over", ["parameters", "tokens"])
def test_a_power_law_of_a_miniseries(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], over: str) -> None:
    keys = ["mini-*", "fit=power_law", f"over={over}", f"paths.runs={runs}", f"to={tmp_path / 'page'}"]
    assert main(["scaling", *keys]) == 0
    out = capsys.readouterr().out
    assert f"val/bpb = E + A × {over}^-alpha: E = 0.6" in out
    assert "alpha = 0.3 (" in out
    assert (tmp_path / "page" / "scaling.html").read_text(encoding="utf-8").count("<svg") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mini-*"], "fit=isoflop: mini-d4 was not trained for a flops_budget."),
        ([], "Choose other runs, as these: iso-1e+15-"),
        (["mini-d4", "fit=power_law"], "of 1 different sizes none can be fitted"),
        (["metric=val/bbp"], "metric=val/bbp: no run has it; did you mean val/bpb?"),
        (["fit=isoflops"], "must be one of isoflop, power_law"),
    ],
)
def test_mistakes_are_told(runs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["scaling", *arguments, f"paths.runs={runs}"]) == 2
    assert message in capsys.readouterr().err


def test_what_else_differs_is_said(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(runs, entry_of("iso-1e+15-0", 42, 1.5, {"model.depth": 4, "flops_budget": 1e15, "model.backout": False}))
    assert main(["scaling", "iso-*", f"paths.runs={runs}"]) == 0
    assert "The runs also differ in model.backout" in capsys.readouterr().out
