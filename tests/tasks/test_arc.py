"""ARC: labels that are letters or digits, three to five choices, and rows that are no questions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nanochat_pl.common.errors import UserError
from tests.helpers.task_tables import opened, write_table


def question(labels: str = "ABCD", answer: str = "B", **changes: Any) -> dict[str, Any]:
    choices = {"text": [f"choice {label}" for label in labels], "label": list(labels)}
    return {"id": "1", "question": "Which?", "choices": choices, "answerKey": answer} | changes


def one(tmp_path: Path, *rows: dict[str, Any]) -> Any:
    return opened("arc_easy", "test", tmp_path, test_path=write_table(tmp_path / "own.parquet", list(rows)))


@pytest.mark.parametrize(
    ("labels", "answer"), [("ABCD", "D"), ("1234", "3"), ("ABC", "A"), ("ABCDE", "E"), ("123", "1")]
)
def test_the_data_set_s_labels_are_the_answers(labels: str, answer: str, tmp_path: Path) -> None:
    task = one(tmp_path, question(labels, answer))
    asked, answered = (message["content"] for message in task[0]["messages"])
    assert answered == answer and task.letters(task[0]) == list(labels)
    lines = "".join(f"- choice {label}={label}\n" for label in labels)
    assert asked == f"Multiple Choice question: Which?\n{lines}\nRespond only with the letter of the correct answer."
    assert [letter for letter in labels if task.evaluate(task[0], letter)] == [answer]
    assert not task.evaluate(task[0], "") and not task.evaluate(task[0], f"It is {answer}")


def test_it_is_categorical_and_guessing_counts(tmp_path: Path) -> None:
    path = write_table(tmp_path / "own.parquet", [question()])
    for name in ("arc_easy", "arc_challenge"):
        task = opened(name, "test", tmp_path, test_path=path)
        assert (task.name, task.kind, task.baseline, task.judged) == (name, "categorical", 0.25, True)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (question(answer="E"), "answerKey is 'E', none of A, B, C, D"),
        (question("AABC"), "4 choices have the labels A, A, B, C"),
        (question("A", "A"), r"choices.text has 1 entries, not 2 … 26"),
        (question(choices={"text": ["a", "b"], "label": ["A"] * 27}), "choices.label has 27 entries"),
        (question(choices={"text": ["a", "b", "c"], "label": ["A", "B"]}), "3 choices have the labels A, B"),
        (question(choices={"text": ["a", None], "label": ["A", "B"]}), "choices.text is no list of texts"),
        (question(choices=["a", "b"]), "choices.text is no list of texts"),
        (question(answerKey=None), "answerKey is NoneType, not text"),
        (question(choices={"text": ["a", "b"], "label": ["(A)", "B"]}), r"the label '\(A\)' is not one letter"),
        (question("AÄ"), "the label 'Ä' is not one letter, A … Z, or digit"),
        (question("A "), "the label ' ' is not one letter, A … Z, or digit"),
    ],
)
def test_rows_that_are_no_questions_are_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"mixture.tasks.arc_easy: own.parquet, row 0: {said}"):
        one(tmp_path, row)[0]


def test_real_questions(shared: Path, tmp_path: Path) -> None:
    hub = shared / "data/hub"
    sizes = {(name, split): len(opened(name, split, tmp_path, hub)) for name, split in SIZES}
    assert sizes == SIZES
    labels: Counter[str] = Counter()
    task = opened("arc_challenge", "test", tmp_path, hub)
    for index in range(len(task)):
        conversation = task[index]
        labels["".join(task.letters(conversation))] += 1
        right = [letter for letter in task.letters(conversation) if task.evaluate(conversation, letter)]
        assert right == [task.row(index)["answerKey"]]
    assert labels == {"ABCD": 1144, "1234": 21, "ABC": 3, "ABCDE": 3, "123": 1}
    assert len(opened("arc_challenge", "test", tmp_path, hub, test_split="validation")) == 299


SIZES = {
    ("arc_easy", "train"): 2251,
    ("arc_easy", "test"): 2376,
    ("arc_challenge", "train"): 1119,
    ("arc_challenge", "test"): 1172,
}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_guessing_among_the_choices_of_other_files(suffix: str, tmp_path: Path, shared: Path) -> None:
    """It was taken to be right once in four, whatever there was to choose from."""
    rows = [question("AB"), question("AB"), question("ABCDE"), question("1234", "1")]
    path = tmp_path / f"own.{suffix}"
    write_table(path, rows)
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, question(choices=None)]), encoding="utf-8")
    for kind in ("arc_easy", "arc_challenge"):
        task = opened(kind, "test", tmp_path, test_path=path, test_size=1)
        assert task.baseline == pytest.approx((1 / 2 + 1 / 2 + 1 / 5 + 1 / 4) / 4), "of all rows, whatever the limit"
        published = opened(kind, "test", tmp_path, shared / "data/hub", path=path)
        assert published.baseline == 0.25, "of the data set's own questions what is said of them, as before"


def test_labels_of_every_row_are_looked_at(tmp_path: Path) -> None:
    rows = [question(), question("1234", "2"), question(choices={"text": ["a", "b"], "label": ["10", "B"]})]
    path = write_table(tmp_path / "own.parquet", rows)
    task = opened("arc_easy", "test", tmp_path, test_path=path, order_seed=None)
    assert task[0] and task[1]
    with pytest.raises(UserError, match=r"own.parquet, row 2: the label '10' is not one letter"):
        task[2]
