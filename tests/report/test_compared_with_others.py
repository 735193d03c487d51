"""The part of a run's report that says how it compares with other runs of the ledger."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nanochat_pl.cli._choose_runs import comparisons_of
from nanochat_pl.cli._sweep_state import numbers_of, sweep_folder
from nanochat_pl.cli.main import main
from nanochat_pl.ledger import append
from tests.comparison.fake_runs import entry_of, make_group
from tests.report.fake_run import make_run

BASE = [1.200, 1.205, 1.195, 1.201, 1.198]
WORSE = [1.210, 1.214, 1.206, 1.210, 1.209]
OFF = {"model.backout": False}


def report_of(runs: Path, name: str) -> tuple[str, dict[str, object]]:
    shutil.rmtree(runs / name, ignore_errors=True)
    make_run(runs / name)
    assert main(["report", f"run={name}", f"paths.runs={runs}"]) == 0
    folder = runs / name / "report"
    plain = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert "<script" not in (folder / "report.html").read_text(encoding="utf-8")
    return (folder / "report.md").read_text(encoding="utf-8"), plain


def test_a_report_shows_the_runs_that_differ_in_little(tmp_path: Path) -> None:
    make_group(tmp_path, "d4", BASE)
    make_group(tmp_path, "d4-plain", WORSE, OFF)
    markdown, plain = report_of(tmp_path, "d4-seed1")
    _, _, section = markdown.partition("## Compared with other runs: base\n")
    table = [line for line in section.splitlines() if line.startswith("| ")]
    assert table[1].startswith("| d4-seed1 (5 seeds) | 5 | 1.1998 | 0.0037 |")
    assert table[2].startswith("| model.backout=false | 5 | 1.2098 |")
    assert table[2].endswith("| worse |")
    assert "pairs of one seed" in section
    assert "base-val-bpb-compared.svg" in section
    (metric, _) = plain["comparisons"]["base"]["metrics"]  # type: ignore[index]
    assert metric["metric"] == "val/bpb"
    assert metric["rows"][1]["difference"]["paired"]


@pytest.mark.parametrize(
    "others",
    [
        [],
        [entry_of("far", 0, 1.1, {"model.depth": 2, "model.backout": False, "max_steps": 9, "total_batch_tokens": 64})],
        [entry_of("copy", 0, 1.2)],
        [entry_of("failed", 1, 1.2, exit="failed")],
        [entry_of("later", 0, 1.2, stage="sft")],
    ],
    ids=["alone", "another experiment", "the same seed again", "unfinished", "another stage"],
)
def test_nothing_is_shown_where_nothing_is_comparable(tmp_path: Path, others: list[object]) -> None:
    for entry in [entry_of("own", 0, 1.2), *others]:
        append(tmp_path, entry)  # type: ignore[arg-type]
    assert comparisons_of(tmp_path, "own") == []


def test_runs_of_one_sweep_are_compared_whatever_they_differ_in(tmp_path: Path) -> None:
    far = {"model.depth": 2, "model.backout": False, "max_steps": 9, "total_batch_tokens": 64}
    for entry in (entry_of("a", 0, 1.2), entry_of("b", 0, 1.3, far)):
        append(tmp_path, entry)
    numbers_of(sweep_folder(tmp_path, ["train"]), ["a", "b"])
    (result,) = comparisons_of(tmp_path, "a")
    assert len(result.groups) == 2
    assert result.metrics[0].rows[1].verdict == "one seed: nothing can be said of noise"


def test_the_run_itself_counts_for_its_seed_and_few_groups_are_shown(tmp_path: Path) -> None:
    append(tmp_path, entry_of("own", 0, 1.2))
    append(tmp_path, entry_of("copy", 0, 9.0))
    append(tmp_path, entry_of("other", 1, 1.3))
    for steps in range(1, 9):
        append(tmp_path, entry_of(f"steps{steps}", 0, 1.2, {"max_steps": steps}))
    (result,) = comparisons_of(tmp_path, "own")
    assert result.metrics[0].rows[0].values == {1: 1.3, 0: 1.2}
    assert len(result.groups) == 7
    assert any("left out" in remark for remark in result.remarks)
    assert any("steps7, steps8" in remark for remark in result.remarks)
