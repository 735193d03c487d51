"""`nanochat-pl compare` on a folder of runs, and its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.ledger import append
from tests.comparison.fake_runs import entry_of, make_group
from tests.report.fake_run import make_run

BASE = [1.200, 1.205, 1.195, 1.201, 1.198]
WORSE = [1.210, 1.214, 1.206, 1.210, 1.209]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make_group(tmp_path / "runs", "d4", BASE, {"model.depth": 4})
    make_group(tmp_path / "runs", "d4-plain", WORSE, {"model.depth": 4, "model.backout": False})
    return tmp_path / "runs"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["compare", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_words_are_names_and_keys_of_train_are_settings(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = printed(capsys, "d4-seed*", "d4-plain-*", "model.depth=4", f"paths.runs={runs}")
    assert (code, err) == (0, "")
    assert "base, val/bpb (less is better)" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("d4-plain-*"))
    assert row[:5] == ["d4-plain-*", "5", "1.2098", "0.0029", "+0.01"]
    assert row[-1] == "worse"
    assert "of pairs of one seed" in out
    said = printed(capsys, "runs=['d4-seed*','d4-plain-*']", "where=model.depth=4", f"paths.runs={runs}")[1]
    assert said == out


def test_runs_are_grouped_by_a_setting_and_one_glob_parts_by_itself(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by = printed(capsys, "by=model.backout", "sequential=true", f"paths.runs={runs}")[1]
    assert "model.backout=false" in by
    assert "hold at every look" in by
    alone = printed(capsys, "d4-*", "sequential=true", f"paths.runs={runs}")[1]
    assert alone == by


def test_several_values_of_a_setting_choose_runs_of_each(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_group(runs, "d2", [1.4, 1.41], {"model.depth": 2})
    make_group(runs, "d6", [1.1, 1.11], {"model.depth": 6})
    out = printed(capsys, "model.depth=2,6", f"paths.runs={runs}")[1]
    assert "model.depth=2" in out and "model.depth=6" in out and "model.depth=4" not in out
    assert printed(capsys, "model.depth!=4", f"paths.runs={runs}")[1] == out


def test_the_page_stands_by_itself(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "page"
    keys = ("by=model.backout", "metrics=[val/bpb,seconds]", f"to={to}", f"paths.runs={runs}")
    assert printed(capsys, *keys)[0] == 0
    page = (to / "compare.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("<svg") == 2 + 5 + 5  # values; curves over four axes and differences, of bpb and of the loss
    assert "worse" in page
    names = {path.name for path in to.iterdir()}
    assert {f"val-bpb-{axis}.svg" for axis in ("steps", "tokens", "flops", "seconds", "differences")} <= names
    found = json.loads((to / "compare.json").read_text(encoding="utf-8"))
    assert found["metrics"][0]["rows"][1]["difference"]["n"] == 5
    assert len(found["runs"]["model.backout=true"]) == 5


def test_a_page_of_entries_that_do_not_say_where_they_are_from(runs: Path, tmp_path: Path) -> None:
    append(runs, entry_of("d4-seed9", 9, 1.2, {"model.depth": 4}, machine={}, git={}))
    assert main(["compare", "d4-seed*", "d4-plain-*", f"to={tmp_path / 'page'}", f"paths.runs={runs}"]) == 0


def test_names_of_strangers_are_text_in_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    make_group(runs, "a", BASE[:2])
    make_group(runs, "b", WORSE[:2], {"data.path": "</svg><script>alert(1)</script> | x"})
    assert printed(capsys, "a-*", "b-*", f"to={tmp_path / 'page'}", f"paths.runs={runs}")[0] == 0
    assert "<script" not in (tmp_path / "page" / "compare.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["d4-sed*"], "no run fits it"),
        (["model.dept=4"], "did you mean model.depth"),
        (["model.depth=5"], "model.depth=5: no run of stage base has it; there are: 4."),
        (["model.depth=5,6"], "model.depth=5,6: no run of stage base has it; there are: 4."),
        (["where=model.depth=4", "max_steps<9"], "max_steps<9: no run of stage base has it; there are: null."),
        (["model=tiny"], "where=model: no entry has such a column"),
        (["metric=[val/bpb]"], "did you mean metrics?"),
        (["stage=rl"], "stage=rl: no run of that stage; there are entries of base."),
        (["a", "runs=[b]"], "runs: is given twice"),
        (["by=model.bakcout"], "did you mean model.backout"),
    ],
)
def test_mistakes_are_told_in_a_line(
    runs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, _, err = printed(capsys, *arguments, f"paths.runs={runs}")
    assert code == 2
    assert message in err


def test_a_stage_that_fewer_runs_have_than_another_is_told(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(runs, replace(entry_of("d4-seed0", 0, 1.23456), stage="sft"))
    code, out, _ = printed(capsys, f"paths.runs={runs}")
    assert code == 0
    assert "1.23456" in out, "a single run has no noise to round to"
    assert "This is stage sft, the last one, which 1 of them finished: stage=base has 10" in out
    assert "This is stage" not in printed(capsys, "stage=base", "by=model.backout", f"paths.runs={runs}")[1]


def test_the_stage_is_the_last_one_of_the_runs_that_are_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep of base beside a run with sft: sft was taken, which none of the sweep has."""
    runs, rates = tmp_path / "runs", (0.01, 0.02, 0.1)
    for rate in rates:
        make_group(runs, f"lo-matrix_lr{rate}", BASE[:2], {"optim.matrix_lr": rate})
    for stage in ("base", "sft"):
        append(runs, replace(entry_of("pipe", 5, 1.3), stage=stage))
    code, out, _ = printed(capsys, "by=optim.matrix_lr", f"paths.runs={runs}")
    assert code == 0 and out.startswith("base, val/bpb")
    assert [f"optim.matrix_lr={rate}" in out for rate in rates] == [True] * 3
    for chosen in ("run=lo-matrix_lr0.1-seed0", "optim.matrix_lr=0.1", "where=run=lo-*"):
        out = printed(capsys, "by=optim.matrix_lr", chosen, f"paths.runs={runs}")[1]
        assert out.startswith("base, val/bpb") and "optim.matrix_lr=0.1" in out and "This is stage" not in out
    assert printed(capsys, "by=optim.matrix_lr", "run=pipe", f"paths.runs={runs}")[1].startswith("sft, val/bpb")
    err = " ".join(printed(capsys, "run=nobody", f"paths.runs={runs}")[2].split())
    assert "run=nobody: no run of stage base or sft has it; there are: lo-matrix_lr0.01-seed0" in err
    err = " ".join(printed(capsys, "stage=sft", "run=lo-*", f"paths.runs={runs}")[2].split())
    assert "run=lo-*: no run of stage sft has it; there are: pipe." in err


def test_an_empty_ledger_says_how_to_fill_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = printed(capsys, f"paths.runs={tmp_path}")
    assert code == 2
    assert "has no entries yet" in err


def test_what_evaluate_has_found_is_compared(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two seeds each, with the same results: no difference at all."""
    for name in ("d4-seed0", "d4-seed1", "d4-plain-seed0", "d4-plain-seed1"):
        results = make_run(tmp_path / "made" / name) / "evaluation" / "sft" / "results.json"
        (runs / name / "evaluation" / "base").mkdir(parents=True)
        (runs / name / "evaluation" / "base" / "results.json").write_bytes(results.read_bytes())
    metric = "evaluate/chat/spelling"
    code, out, err = printed(capsys, "by=model.backout", f"metrics=[{metric}]", f"paths.runs={runs}")
    assert (code, err) == (0, "")
    assert f"{metric} (more is better)" in out
    assert "no difference: the means are equal" in out
    assert f"Not measured: {metric} of d4-seed2" in out
