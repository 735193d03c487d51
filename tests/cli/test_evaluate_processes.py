"""Several processes evaluate together: the same results, written once, and errors that all of them share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nanochat_pl.cli import evaluate as command
from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import SharedError, UserError
from nanochat_pl.common.files import read_json
from tests.helpers.evaluated import QUICK, make_eval_bundle, make_run, results_of
from tests.helpers.processes import run

SUITES = "suites=[core,chat,samples]"


def evaluate(folder: str, keys: list[str]) -> Any:
    before = Path.cwd()
    os.chdir(folder)
    try:
        return command.run(["run=a", "core.path=tasks_of_core", *QUICK, *keys])
    except SharedError as error:
        return ["shared", *error.problems]
    except UserError as error:
        return ["alone", *error.problems]
    finally:
        os.chdir(before)


def metrics(to: str) -> Any:
    """Accuracies and n of all tasks."""
    suites = read_json(Path(to) / "results.json")["suites"]
    rows = {name: suite["tasks"] for name, suite in suites.items() if isinstance(suite, dict)}
    return {name: [(row["name"], row["accuracy"], row["n"]) for row in each] for name, each in rows.items()}


@pytest.mark.slow
def test_two_processes_find_what_one_finds(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run("a")
    make_run("b", seed=1)
    make_eval_bundle(here / "tasks_of_core")
    assert main(["evaluate", "run=a", "core.path=tasks_of_core", "to=one", "against=b", SUITES, *QUICK]) == 0
    assert run(2, evaluate, str(here), [SUITES, "to=two", "against=b"]) == [0, 0]
    assert metrics("two") == metrics("one")
    names = sorted(path.relative_to("one") for path in Path("one").rglob("*"))
    assert sorted(path.relative_to("two") for path in Path("two").rglob("*")) == names
    # What two processes have found is there for one, and the other way round.
    capsys.readouterr()
    assert main(["evaluate", "run=a", "core.path=tasks_of_core", "to=two", SUITES, *QUICK]) == 0
    assert "Measured before: copa, squad, arithmetic, identity, samples." in capsys.readouterr().out
    assert run(2, evaluate, str(here), [SUITES, "to=one", "against=two"]) == [0, 0]


@pytest.mark.slow
def test_errors_are_shared(here: Path) -> None:
    make_run("a")
    for keys, problem in [
        (["limit=0"], "limit=0: is below 1."),
        (["suites=[harness]"], "harness.tasks: is empty."),
        (["suites=[chat]", "against=nobody"], "against=nobody: run=nobody: there is no such run in runs; valid: a"),
        (["run=b", "suites=[chat]"], "run=b: there is no such run in runs; valid: a"),
    ]:
        assert run(2, evaluate, str(here), keys) == [["shared", problem]] * 2
    assert not Path("runs/a/evaluation").exists()
    make_run("c", stage="base")
    answers = run(2, evaluate, str(here), ["run=c", "suites=[chat,chatcore]"])
    assert answers[0] == answers[1] and answers[0][0] == "shared" and len(answers[0]) == 3


def test_one_writes(here: Path) -> None:
    make_run("a")
    assert run(2, evaluate, str(here), ["suites=[chat]", "limit=1"]) == [0, 0]
    assert [task["n"] for task in results_of("a")["suites"]["chat"]["tasks"]] == [1, 1]
