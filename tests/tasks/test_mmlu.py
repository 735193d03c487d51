"""MMLU: letters of the choices, subjects, equal choices and blanks, and rows that are no questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build
from nanochat_pl.tasks.published.mmlu import MMLUSettings
from tests.helpers.task_tables import opened, write_table


def question(answer: object = 1, subject: str = "law", **changes: Any) -> dict[str, Any]:
    return {"question": "Which?", "subject": subject, "choices": ["a", "b", "c", "d"], "answer": answer} | changes


def one(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> Any:
    path = write_table(tmp_path / "own.parquet", list(rows))
    return opened("mmlu", "test", tmp_path, test_path=path, order_seed=None, **settings)


def test_a_question_is_answered_by_a_letter(tmp_path: Path) -> None:
    task = one(tmp_path, question())
    conversation = task[0]
    asked, answer = (message["content"] for message in conversation["messages"])
    assert asked == (
        "Multiple Choice question: Which?\n- a=A\n- b=B\n- c=C\n- d=D\n\n"
        "Respond only with the letter of the correct answer."
    )
    assert answer == "B" and conversation["subject"] == "law"
    assert [letter for letter in task.letters(conversation) if task.evaluate(conversation, letter)] == ["B"]
    assert (task.kind, task.baseline) == ("categorical", 0.25)


def test_texts_are_the_data_set_s(tmp_path: Path) -> None:
    """No blank comes before a letter, whatever surrounds a choice; of two equal choices one is right."""
    task = one(tmp_path, question(3, question=" Which\n\n?\n", choices=[" a ", "same", "", "same"]))
    asked = task[0]["messages"][0]["content"]
    assert asked.startswith("Multiple Choice question:  Which\n\n?\n\n-  a =A\n- same=B\n- =C\n- same=D\n\nRespond")
    assert [letter for letter in "ABCD" if task.evaluate(task[0], letter)] == ["D"]


def test_subjects(tmp_path: Path) -> None:
    rows = [question(n % 4, subject) for n, subject in enumerate(("law", "virology", "law", "astronomy"))]
    subjects = [task["subject"] for task in one(tmp_path, *rows, subjects=["law", "astronomy"])]
    assert subjects == ["law", "law", "astronomy"]
    with pytest.raises(UserError, match=r"mmlu.subjects: 'virolgy': no subject here; did you mean virology\?"):
        one(tmp_path, *rows, subjects=["law", "virolgy"])
    unnamed = [question(n % 4, "") for n in range(3)]
    assert len(one(tmp_path, *unnamed, subjects=["law"])) == 3, "a table without subjects stays whole"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (question(4), "answer is 4, not the number of one of 4 choices, from 0"),
        (question(-1), "answer is -1"),
        (question("B"), "answer is 'B'"),
        (question(True), "answer is True"),
        (question(None), "answer is None"),
        (question(choices=["a"]), "choices has 1 entries"),
        (question(choices="abcd"), "choices is no list of texts"),
        (question(choices=None), "choices is no list of texts"),
    ],
)
def test_rows_that_are_no_questions_are_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"mixture.tasks.mmlu: own.parquet, row 0: {said}"):
        one(tmp_path, row)[0]


def test_guessing_among_the_choices_of_other_files(tmp_path: Path, shared: Path) -> None:
    rows = [question(0, subject, choices=list("abcde"[:n])) for subject, n in (("law", 2), ("law", 5), ("art", 3))]
    assert one(tmp_path, *rows).baseline == pytest.approx((1 / 2 + 1 / 5 + 1 / 3) / 3)
    assert one(tmp_path, *rows, subjects=["law"]).baseline == pytest.approx((1 / 2 + 1 / 5) / 2)
    assert one(tmp_path, question(choices="abcd")).baseline == 0.25, "none is a question: they are refused when asked"
    write_table(tmp_path / "hub/datasets/some/other/all/test-0.parquet", rows)
    other = opened("mmlu", "test", tmp_path, tmp_path / "hub", repo="some/other")
    assert other.baseline == pytest.approx((1 / 2 + 1 / 5 + 1 / 3) / 3), "and of another data set"
    assert opened("mmlu", "test", tmp_path, shared / "data/hub").baseline == 0.25


def test_splits() -> None:
    with pytest.raises(UserError, match="test_split='tests': must be one of test, validation, dev"):
        build(MMLUSettings, {"test_split": "tests"})
    assert build(MMLUSettings, {"train_split": "dev", "test_split": "validation"}).test_split == "validation"


def test_real_questions(shared: Path, tmp_path: Path) -> None:
    hub = shared / "data/hub"
    task = opened("mmlu", "test", tmp_path, hub)
    subjects = {task.row(index)["subject"] for index in range(len(task))}
    assert (len(task), len(subjects)) == (14_042, 57)
    first = {task.row(index)["subject"] for index in range(500)}
    assert len(first) > 50, "a part of it is a sample of all subjects"
    doubled = [index for index in range(len(task)) if len(set(task.row(index)["choices"])) < 4]
    assert len(doubled) == 9
    for index in doubled:
        assert sum(task.evaluate(task[index], letter) for letter in "ABCD") == 1
    train = opened("mmlu", "train", tmp_path, hub, subjects=["virology"])
    assert len(train) == 1_218 and train[0]["subject"] == ""
    counts = {split: len(opened("mmlu", "test", tmp_path, hub, test_split=split)) for split in ("validation", "dev")}
    assert counts == {"validation": 1_531, "dev": 285}
    few = opened("mmlu", "test", tmp_path, hub, subjects=["virology", "astronomy"], test_split="dev")
    assert len(few) == 10
