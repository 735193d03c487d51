"""Two models on the same problems: paired differences, and what cannot be compared is refused first."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import UserError
from nanochat_pl.evaluation.compare import locate_other
from nanochat_pl.evaluation.results import from_plain, paired_difference, paired_summary
from nanochat_pl.evaluation.suites import SuiteResult
from tests.helpers.evaluated import QUICK, make_eval_bundle, make_run, record_of, results_of

Captured = pytest.CaptureFixture[str]
RUNS = Path("runs")


def evaluate(*keys: str) -> int:
    return main(["evaluate", "run=a", "suites=[core,samples]", "core.path=tasks_of_core", *QUICK, *keys])


@pytest.fixture
def two(here: Path) -> Path:
    """The current folder, with runs a and b, and evaluation data."""
    make_run("a")
    make_run("b", seed=1)
    make_eval_bundle(here / "tasks_of_core")
    return here


def result_in(path: Path):
    return from_plain(json.loads(path.read_text(encoding="utf-8"))["results"][0], str(path))


def test_another_run_is_measured_on_the_same_problems(two: Path, capsys: Captured) -> None:
    assert evaluate("against=b") == 0
    out = capsys.readouterr().out
    assert "Now b, on the same problems:" in out and "this model minus b" in out
    folder = Path("runs/a/evaluation/sft")
    (theirs,) = folder.glob("against/*/tasks/core")
    mine = folder / "tasks" / "core"
    names = ("copa", "squad")
    pairs = [(result_in(mine / f"{name}.json"), result_in(theirs / f"{name}.json")) for name in names]
    expected = [paired_difference(*pair) for pair in pairs]
    core = results_of("a")["suites"]["core"]
    assert core["against"] == "b"
    assert core["differences"] == [vars(each) for each in expected]
    summary = paired_summary("CORE (2 of 22 tasks)", *zip(*pairs, strict=True))
    assert core["summary_difference"] == vars(summary)
    rows = list(csv.DictReader((folder / "differences.csv").open(encoding="utf-8")))
    assert [row["task"] for row in rows] == ["copa", "squad", "CORE (2 of 22 tasks)"]
    assert float(rows[0]["difference"]) == pytest.approx(pairs[0][0].accuracy - pairs[0][1].accuracy)
    assert not Path("runs/b/evaluation").exists()
    assert evaluate("against=b/sft") == 0
    assert capsys.readouterr().out.count("Measured before: copa, squad") == 2


def test_results_of_its_own_are_taken_where_they_fit(two: Path, capsys: Captured) -> None:
    command = ["evaluate", "run=b", "suites=[core]", "core.path=tasks_of_core", *QUICK]
    assert main(command) == 0
    for against in ("b", "runs/b/sft"):
        assert evaluate(f"against={against}") == 0
        assert f"Now {against}, on the same problems:\nMeasured before: copa, squad." in capsys.readouterr().out
    assert not Path("runs/a/evaluation/sft/against").exists()
    assert evaluate("against=b", "core.max_per_task=4") == 0
    assert Path("runs/a/evaluation/sft/against").exists()
    assert json.loads(record_of("b", "core", "copa").read_text(encoding="utf-8"))["results"][0]["n"] == 8


def test_a_folder_of_results_needs_no_model(two: Path, capsys: Captured) -> None:
    command = ["evaluate", "run=b", "suites=[core]", "core.path=tasks_of_core", "to=kept", *QUICK]
    assert main(command) == 0
    shutil.rmtree("runs/b")
    capsys.readouterr()
    assert evaluate("against=kept") == 0
    assert results_of("a")["suites"]["core"]["against"] == "kept"
    record_of_squad = Path("kept/tasks/core/squad.json")
    value = json.loads(record_of_squad.read_text(encoding="utf-8"))
    value["problems"] = {"data": "others"}
    record_of_squad.write_text(json.dumps(value), encoding="utf-8")
    assert evaluate("against=kept") == 0
    assert "core, squad: has other problems there, so it is not compared." in capsys.readouterr().out
    found = results_of("a")["suites"]["core"]
    assert [each["name"] for each in found["differences"]] == ["copa"]
    assert found["summary_difference"]["name"] == "CORE (1 of 22 tasks)"


def test_a_model_that_was_trained_again_is_compared_with_its_own_folder(two: Path, capsys: Captured) -> None:
    """The records were overwritten before they were read: every difference was 0, whatever had changed."""
    folder = Path("runs/a/evaluation/sft")
    assert evaluate() == 0
    before = result_in(folder / "tasks/core/copa.json"), result_in(folder / "tasks/core/squad.json")
    make_run("a", seed=7)
    assert evaluate(f"against={folder}") == 0
    after = result_in(folder / "tasks/core/copa.json"), result_in(folder / "tasks/core/squad.json")
    assert after != before, "the test is about two models"
    expected = [vars(paired_difference(*pair)) for pair in zip(after, before, strict=True)]
    assert results_of("a")["suites"]["core"]["differences"] == expected
    # By now the folder has results of this very model, as after a stop.
    capsys.readouterr()
    assert evaluate(f"against={folder}") == 2
    said = capsys.readouterr()
    assert "core, copa: is of this very model, so it is not compared." in said.out
    assert f"against={folder}: has results of this very model by now." in said.err
    assert results_of("a")["suites"]["core"]["differences"] == expected


def test_differences_are_those_of_results_json(two: Path) -> None:
    differences = Path("runs/a/evaluation/sft/differences.csv")
    assert evaluate("against=b") == 0
    with differences.open(encoding="utf-8") as file:
        assert [row["against"] for row in csv.DictReader(file)] == ["b"] * 3
    assert evaluate("suites=[samples]") == 0
    assert differences.exists() and "differences" in results_of("a")["suites"]["core"]
    assert evaluate() == 0
    assert not differences.exists() and "differences" not in results_of("a")["suites"]["core"]


def test_what_cannot_be_compared_is_refused_before_anything_is_measured(two: Path, capsys: Captured) -> None:
    make_run("c", stage="base")
    Path("empty").mkdir()
    assert main(["evaluate", "run=b", "suites=[core]", "core.path=tasks_of_core", "to=kept", *QUICK]) == 0
    for against, suites, problem in [
        ("nobody", "[core]", "against=nobody: run=nobody: there is no such run"),
        ("empty", "[core]", "against=empty: is no bundle, and no folder of results"),
        ("b", "[samples]", "against=b: samples are no metrics to compare."),
        ("c", "[chat]", "is a base model, which has seen no conversation"),
        ("kept", "[chat]", "against=kept: has none of these tasks with the same problems: arithmetic, identity."),
    ]:
        assert evaluate(f"against={against}", f"suites={suites}") == 2
        assert problem in capsys.readouterr().err
    damaged = Path("kept/tasks/core/copa.json")
    damaged.write_text("{", encoding="utf-8")
    assert evaluate("against=kept", "suites=[core]") == 2
    assert f"{damaged}: is no valid JSON" in capsys.readouterr().err
    assert not record_of("a", "core", "copa").exists()


def test_names_of_what_is_compared_with(here: Path) -> None:
    make_run("a", stage="base")
    bundle = make_run("a")
    for against in ("a", "runs/a", "a/sft", "runs/a/sft", "runs/a/sft/bundle", "a/sft/bundle"):
        assert locate_other(against, RUNS).bundle == bundle
    assert locate_other("a/base", RUNS).bundle == Path("runs/a/base/bundle")
    (bundle / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"against=a/sft: .* has no tokenizer"):
        locate_other("a/sft", RUNS)
    for against, said in [
        ("", "names nothing"),
        ("/dev/zero", "is no folder"),
        ("/nowhere/else", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
    ]:
        with pytest.raises(UserError, match=f"^against={against}: {said}") as error:
            locate_other(against, RUNS)
        assert "RUN/STAGE" in error.value.fix


def test_bits_per_byte_are_not_paired() -> None:
    def differences(mine: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
        compared = SuiteResult("bpb", plain=mine).compared_with(SuiteResult("bpb", plain=theirs), "other")
        return {key: value for key, value in compared.plain.items() if key.startswith("difference")}

    found = differences({"bpb": 1.0, "bpb_stderr": 0.03}, {"bpb": 1.5, "bpb_stderr": 0.04})
    assert found == pytest.approx({"difference": -0.5, "difference_stderr": 0.05})
    assert differences({"bpb": 1.0}, {"bpb": 1.5}) == {"difference": -0.5}
    assert differences({"loss": 1.0}, {"bpb": 1.5}) == {}
