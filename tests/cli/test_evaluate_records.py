"""Finished tasks are kept: the same command goes on, and nothing is measured twice, or taken for what it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat_pl.cli import evaluate_suites
from nanochat_pl.cli.main import main
from tests.cli.evaluated import QUICK, make_run, record_of, results_of

Captured = pytest.CaptureFixture[str]
Asked = list[str]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Names of the tasks that the model was asked, in order."""
    return watch(monkeypatch, lambda name: None)


def watch(monkeypatch: pytest.MonkeyPatch, before: Callable[[str], None]) -> Asked:
    names: Asked = []
    really = evaluate_suites.evaluate_task

    def evaluate_task(engine, task, *arguments, **settings):
        before(task.name)
        names.append(task.name)
        return really(engine, task, *arguments, **settings)

    monkeypatch.setattr(evaluate_suites, "evaluate_task", evaluate_task)
    return names


def evaluate(*keys: str) -> int:
    return main(["evaluate", "run=a", "suites=[chat,samples]", *QUICK, *keys])


def test_the_same_command_does_nothing_twice(here: Path, asked: Asked, capsys: Captured) -> None:
    make_run("a")
    assert evaluate() == 0
    first, files = results_of("a"), [*Path("runs").rglob("*")]
    shown = capsys.readouterr().out
    assert asked == ["arithmetic", "identity"]
    assert evaluate() == 0
    assert asked == ["arithmetic", "identity"]
    assert results_of("a") == first and [*Path("runs").rglob("*")] == files
    assert capsys.readouterr().out == f"Measured before: arithmetic, identity, samples.\n{shown}"


def test_a_stopped_command_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("a")

    def stop(name: str) -> None:
        if name == "identity":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        assert watch(patch, stop) == [] and evaluate() == 130
    assert record_of("a", "chat", "arithmetic").is_file()
    assert not Path("runs/a/evaluation/sft/results.json").exists()
    asked = watch(monkeypatch, lambda name: None)
    assert evaluate() == 0
    assert asked == ["identity"]
    assert [task["n"] for task in results_of("a")["suites"]["chat"]["tasks"]] == [6, 4]


def test_other_settings_are_measured_anew_and_said(here: Path, asked: Asked, capsys: Captured) -> None:
    make_run("a")
    assert evaluate("limit=4") == 0
    assert evaluate("limit=5") == 0
    assert asked == ["arithmetic", "identity", "arithmetic"]  # of identity there are 4
    assert "Measured again (chat): arithmetic. Before: n=4.\n" in capsys.readouterr().out
    assert evaluate("limit=5", "batch_size=2", "num_rows=7", "seed=3") == 0
    assert len(asked) == 3
    assert evaluate("limit=5", "max_tokens=2") == 0
    assert "Measured again (chat): arithmetic, identity. Before: max_tokens=3.\n" in capsys.readouterr().out
    assert evaluate("limit=5", "max_tokens=2", "temperature=1", "seed=3") == 0
    assert evaluate("limit=5", "max_tokens=2", "temperature=1", "seed=4") == 0
    assert "Measured again (chat): arithmetic, identity. Before: seed=3.\n" in capsys.readouterr().out
    assert len(asked) == 9


def test_another_model_is_measured_anew_and_nothing_of_the_old_one_stays(
    here: Path, asked: Asked, capsys: Captured
) -> None:
    make_run("a")
    assert evaluate() == 0
    make_run("a", seed=1, tasks={"arithmetic": {"test_size": 6}})
    assert evaluate("suites=[chat]") == 0
    assert asked == ["arithmetic", "identity", "arithmetic"]
    assert "Measured again (chat): arithmetic. The model is another one." in capsys.readouterr().out
    assert list(results_of("a")["suites"]) == ["chat"]
    folder = Path("runs/a/evaluation/sft")
    assert [path.name for path in folder.glob("answers_*")] == ["answers_arithmetic.jsonl"]


def test_other_problems_are_measured_anew(here: Path, asked: Asked, capsys: Captured) -> None:
    make_run("a", tasks={"arithmetic": {"test_size": 6}})
    assert evaluate() == 0
    make_run("a", tasks={"arithmetic": {"test_size": 6, "max_operand": 500}})
    assert evaluate() == 0
    assert asked == ["arithmetic", "arithmetic"]
    assert "Measured again (chat): arithmetic. The problems are others." in capsys.readouterr().out


def test_suites_of_other_commands_stay(here: Path, asked: Asked) -> None:
    make_run("a")
    assert evaluate("suites=[samples]") == 0
    assert evaluate("suites=[chat]") == 0
    assert list(results_of("a")["suites"]) == ["chat", "samples"]


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 2}', "accuracy", "answers"])
def test_a_damaged_record_is_measured_again(damage: str, here: Path, asked: Asked, capsys: Captured) -> None:
    make_run("a")
    assert evaluate() == 0
    first, path = results_of("a"), record_of("a", "chat", "identity")
    record = json.loads(path.read_text(encoding="utf-8"))
    if damage == "accuracy":  # not what the outcomes give
        record["results"][0]["accuracy"] = 0.99
    elif damage == "answers":
        record["results"][0]["answers"] = 7
    path.write_text(damage if damage.startswith(("{", "[")) else json.dumps(record), encoding="utf-8")
    assert evaluate() == 0
    assert asked == ["arithmetic", "identity", "identity"]
    assert results_of("a") == first
    assert "Measured again (chat): identity. " in capsys.readouterr().out


def test_results_that_are_damaged_are_written_anew(here: Path, asked: Asked) -> None:
    make_run("a")
    assert evaluate() == 0
    first = results_of("a")
    Path("runs/a/evaluation/sft/results.json").write_text("{", encoding="utf-8")
    assert evaluate() == 0
    assert results_of("a") == first and len(asked) == 2
