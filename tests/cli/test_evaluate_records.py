"""Finished tasks are kept: the same command goes on, and nothing is measured twice, or taken for what it is not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat_pl.cli import _evaluate, evaluate_suites
from nanochat_pl.cli.main import main
from nanochat_pl.evaluation import jobs
from nanochat_pl.evaluation.suites import CHATCORE, read_results
from tests.helpers.evaluated import QUICK, make_run, record_of, results_of

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


def ask(*keys: str) -> int:
    return main(["evaluate", "run=a", "suites=[chat,samples]", *QUICK, *keys])


def test_the_same_command_does_nothing_twice(here: Path, asked: Asked, capsys: Captured) -> None:
    make_run("a")
    assert ask() == 0
    first, files = results_of("a"), [*Path("runs").rglob("*")]
    shown = capsys.readouterr().out
    assert asked == ["arithmetic", "identity"]
    assert ask() == 0
    assert asked == ["arithmetic", "identity"]
    assert results_of("a") == first and [*Path("runs").rglob("*")] == files
    finished = re.findall(r"^(?:arithmetic|identity): .* ± .* %, n [64]\n", shown, re.MULTILINE)
    assert len(finished) == 2, "a line for each task as soon as it is finished"
    for line in finished:
        shown = shown.replace(line, "")
    assert capsys.readouterr().out == f"Measured before: arithmetic, identity, samples.\n{shown}"


def test_a_stopped_command_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("a")

    def stop(name: str) -> None:
        if name == "identity":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        assert watch(patch, stop) == [] and ask() == 130
    assert record_of("a", "chat", "arithmetic").is_file()
    assert not Path("runs/a/evaluation/sft/results.json").exists()
    asked = watch(monkeypatch, lambda name: None)
    assert ask() == 0
    assert asked == ["identity"]
    assert [task["n"] for task in results_of("a")["suites"]["chat"]["tasks"]] == [6, 4]


def test_other_settings_are_measured_anew_and_said(here: Path, asked: Asked, capsys: Captured) -> None:
    make_run("a")
    assert ask("limit=4") == 0
    assert ask("limit=5") == 0
    assert asked == ["arithmetic", "identity", "arithmetic"]  # of identity there are 4
    assert "Measured again, as the model, the problems or settings are others: arithmetic.\n" in capsys.readouterr().out
    assert ask("limit=5", "batch_size=2", "num_rows=7", "seed=3") == 0
    assert len(asked) == 3
    assert ask("limit=5", "max_tokens=2") == 0
    assert ask("limit=5", "max_tokens=2", "temperature=1", "seed=3") == 0
    assert ask("limit=5", "max_tokens=2", "temperature=1", "seed=4") == 0
    assert capsys.readouterr().out.count("settings are others: arithmetic, identity.\n") == 3
    assert len(asked) == 9


def test_another_model_is_measured_anew_and_nothing_of_the_old_one_stays(
    here: Path, asked: Asked, capsys: Captured
) -> None:
    make_run("a")
    assert ask() == 0
    make_run("a", seed=1, tasks={"arithmetic": {"test_size": 6}})
    assert ask("suites=[chat]") == 0
    assert asked == ["arithmetic", "identity", "arithmetic"]
    assert list(results_of("a")["suites"]) == ["chat"]
    folder = Path("runs/a/evaluation/sft")
    assert [path.name for path in folder.glob("answers_*")] == ["answers_arithmetic.jsonl"]


def test_other_problems_are_measured_anew(here: Path, asked: Asked, capsys: Captured) -> None:
    make_run("a", tasks={"arithmetic": {"test_size": 6}})
    assert ask() == 0
    make_run("a", tasks={"arithmetic": {"test_size": 6, "max_operand": 500}})
    assert ask() == 0
    assert asked == ["arithmetic", "arithmetic"]


def test_figures_of_an_earlier_version_are_measured_anew(
    here: Path, asked: Asked, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that was mended had no say: the old verdicts were taken for its own."""
    make_run("a")
    assert ask() == 0
    for module in (_evaluate, jobs):
        monkeypatch.setattr(module, "METRICS_VERSION", 1000)
    assert ask("suites=[chat]") == 0
    assert asked == ["arithmetic", "identity"] * 2
    assert list(results_of("a")["suites"]) == ["chat"] and results_of("a")["version"] == 1000


def test_tables_of_tasks_that_are_left_out_now_do_not_stay(here: Path) -> None:
    make_run("a")
    off = ["suites=[chatcore]", *(f"chatcore.{name}=null" for name in CHATCORE)]
    folder = Path("runs/a/evaluation/sft")
    (folder / "mine").mkdir(parents=True)
    (folder / "answers_of_mine.jsonl").write_text("{}", encoding="utf-8")
    assert ask(*off, "chatcore.arithmetic.test_size=3", "chatcore.identity.test_size=3") == 0
    assert ask("suites=[chat]") == 0
    assert ask(*off, "chatcore.arithmetic.test_size=3") == 0
    answers = {path.name for path in folder.glob("answers_*")}
    of_chat = {"answers_arithmetic.jsonl", "answers_identity.jsonl"}
    assert answers == {*of_chat, "answers_chatcore_arithmetic.jsonl", "answers_of_mine.jsonl"}


def test_half_a_surrogate_pair_is_written_and_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended the command, after the task was measured."""
    make_run("a", tasks={"arithmetic": {"test_size": 6}})
    really = evaluate_suites.evaluate_task

    def evaluate_task(*arguments, **settings):
        result = really(*arguments, **settings)
        result.answers[0]["answer"] = "an \ud83d \\ud83d"
        return result

    monkeypatch.setattr(evaluate_suites, "evaluate_task", evaluate_task)
    assert ask() == 0 and ask() == 0
    record = json.loads(record_of("a", "chat", "arithmetic").read_text(encoding="utf-8"))
    assert record["results"][0]["answers"][0]["answer"] == "an \ud83d \\ud83d"
    lines = Path("runs/a/evaluation/sft/answers_arithmetic.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["answer"] == "an \ud83d \\ud83d"


def test_suites_of_other_commands_stay(here: Path, asked: Asked) -> None:
    make_run("a")
    assert ask("suites=[samples]") == 0
    assert ask("suites=[chat]") == 0
    assert list(results_of("a")["suites"]) == ["chat", "samples"]


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 2}', "answers"])
def test_a_damaged_record_is_measured_again(damage: str, here: Path, asked: Asked, capsys: Captured) -> None:
    make_run("a")
    assert ask() == 0
    first, path = results_of("a"), record_of("a", "chat", "identity")
    record = json.loads(path.read_text(encoding="utf-8"))
    if damage == "answers":
        record["results"][0]["answers"] = 7
    path.write_text(damage if damage.startswith(("{", "[")) else json.dumps(record), encoding="utf-8")
    assert ask() == 0
    assert asked == ["arithmetic", "identity", "identity"]
    assert results_of("a") == first
    assert re.search(r"^Measured again.*: identity\.$", capsys.readouterr().out, re.MULTILINE)


def test_results_that_are_damaged_are_written_anew(here: Path, asked: Asked) -> None:
    make_run("a")
    assert ask() == 0
    first = results_of("a")
    Path("runs/a/evaluation/sft/results.json").write_text("{", encoding="utf-8")
    assert ask() == 0
    assert results_of("a") == first and len(asked) == 2


def test_figures_of_fewer_problems_replace_none_of_more(here: Path, asked: Asked, capsys: Captured) -> None:
    """`limit=20` took the place of n=200 in the results and in the report."""
    make_run("a")
    assert ask("limit=2") == 0
    assert ask("limit=5") == 0
    evaluation = Path("runs/a/evaluation/sft")
    whole, table, answers = (
        results_of("a")["suites"]["chat"],
        *texts_of(evaluation, "chat.csv", "answers_identity.jsonl"),
    )
    assert [row["n"] for row in whole["tasks"]] == [5, 4] and "fewer" not in whole
    asked.clear()
    capsys.readouterr()
    assert ask("limit=3") == 0
    assert asked == ["arithmetic", "identity"]
    chat = results_of("a")["suites"]["chat"]
    assert {**chat, "fewer": None} == {**whole, "fewer": None}
    assert [(row["name"], row["n"]) for row in chat["fewer"]] == [("arithmetic", 3), ("identity", 3)]
    assert texts_of(evaluation, "chat.csv", "answers_identity.jsonl") == [table, answers]
    said = capsys.readouterr().out
    assert (
        "chat: the metrics of more problems stay in the results and the report: arithmetic (n 5), identity (n 4)."
        in said
    )
    # All of them are there now.
    asked.clear()
    for limit in (2, 3, 5):
        assert ask(f"limit={limit}") == 0
    assert asked == [] and results_of("a")["suites"]["chat"] == whole
    assert read_results(evaluation).suites["chat"].tasks[0].n == 5


def test_nor_where_another_setting_differs_too(here: Path, asked: Asked) -> None:
    """`limit=20 max_tokens=…` took the place of n=200, which was measured again the next time."""
    make_run("a")
    assert ask("limit=5") == 0
    whole = results_of("a")["suites"]["chat"]["tasks"]
    for _ in range(2):
        assert ask("limit=3", "max_tokens=2", "dtype=bfloat16") == 0
    chat = results_of("a")["suites"]["chat"]
    assert [(row["name"], row["n"]) for row in chat["fewer"]] == [("arithmetic", 3), ("identity", 3)]
    for row, before in zip(chat["tasks"], whole, strict=True):
        assert row["remark"] == "measured with max_tokens=3, dtype=float32"
        assert {**row, "remark": None, "details": None} == {**before, "details": None}
    assert ask("limit=5") == 0
    assert results_of("a")["suites"]["chat"]["tasks"] == whole
    assert asked == ["arithmetic", "identity"] * 2, "all of them were kept"
    # Of as many problems the newest metrics are taken.
    assert ask("limit=5", "max_tokens=2") == 0
    assert len(asked) == 6 and "remark" not in results_of("a")["suites"]["chat"]["tasks"][0]["details"]


def texts_of(folder: Path, *names: str) -> list[str]:
    return [(folder / name).read_text(encoding="utf-8") for name in names]
