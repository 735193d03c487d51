"""GSM8K: solutions as parts with calls of the calculator, and how a final number is found and compared."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.tasks.base import Completion, conversation_of
from nanochat_pl.tasks.published.gsm8k import final_number, solution_parts
from tests.helpers.task_tables import opened, problem, write_table

SOLUTION = "He makes 8/2=<<8/2=4>>4 a day.\nThat is $<<1000+4=1,004>>1,004.\n#### 1,004"


def test_calls_are_parts() -> None:
    assert solution_parts(SOLUTION) == [
        {"type": "text", "text": "He makes 8/2="},
        {"type": "python", "text": "8/2"},
        {"type": "python_output", "text": "4"},
        {"type": "text", "text": "4 a day.\nThat is $"},
        {"type": "python", "text": "1000+4"},
        {"type": "python_output", "text": "1,004"},
        {"type": "text", "text": "1,004.\n#### 1,004"},
    ]
    recomputed = [part["text"] for part in solution_parts(SOLUTION, recompute=True) if part["type"] == "python_output"]
    assert recomputed == ["4.0", "1004"]


@pytest.mark.parametrize(
    "answer", ["#### 3", "<<1+2=3>>#### 3", "a << b\n#### 3", "<<1+2>>3\n#### 3", "<<1+2=3\n#### 3"]
)
def test_what_is_no_call_stays_text(answer: str) -> None:
    parts = solution_parts(answer)
    marks = {"python": "<<{}=", "python_output": "{}>>", "text": "{}"}
    assert "".join(marks[part["type"]].format(part["text"]) for part in parts) == answer
    assert all(part["text"] for part in parts)


def test_what_the_calculator_cannot_compute_stays_as_it_is() -> None:
    parts = solution_parts("<<x+1=4>>4 <<1/0=7>>\n#### 4", recompute=True)
    assert [part["text"] for part in parts if part["type"] == "python_output"] == ["4", "7"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", 18),
        ("so it is 5.\n#### 1,000", 1000),
        ("#### 1000.0", 1000),
        ("#### 1000.", 1000),
        ("####1000", 1000),
        ("#### $1,000.00", 1000),
        ("#### -$5", -5),
        ("#### $-5", -5),
        ("#### −5", -5),
        ("#### +5", 5),
        ("#### **5**", 5),
        ("#### \\$5", 5),
        ("#### 5 apples", 5),
        ("#### 5%", 5),
        ("#### 05", 5),
        ("#### .5", Fraction(1, 2)),
        ("#### 3/4", Fraction(3, 4)),
        ("#### 0.75", Fraction(3, 4)),
        ("#### -3 / 4", Fraction(-3, 4)),
        ("#### 5\n#### 6", 5),
        ("#### -0", 0),
        ("#### 0.1", Fraction(1, 10)),
        ("#### 12345678901234567890", 12345678901234567890),
    ],
)
def test_final_numbers(text: str, number: int | Fraction) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    "text", ["", "5", "### 5", "####", "#### five", "#### x = 5", "#### 1/0", "#### -", "#### ,", "#### " + "9" * 101]
)
def test_what_is_no_final_number(text: str) -> None:
    assert final_number(text) is None


def test_a_hostile_answer_is_judged_at_once() -> None:
    for text in ("####" * 50_000, "#### " + " " * 100_000, "#### " + "1," * 100_000, "#### 1/" + "9" * 100_000):
        assert final_number(text) is None


def test_answers_are_judged_by_their_number(tmp_path: Path) -> None:
    path = write_table(tmp_path / "own.parquet", [problem(1004)])
    task = opened("gsm8k", "test", tmp_path, test_path=path)
    conversation = conversation_of("?", solution_parts(SOLUTION))
    for answer in ("#### 1004", "#### $1,004.00", solution_parts(SOLUTION), [{"type": "text", "text": "#### 1004.0"}]):
        assert task.evaluate(conversation, answer) and task.reward(conversation, Completion(answer)) == 1.0
    in_tool = [{"type": "python_output", "text": "#### 1004"}]
    for answer in ("1004", "#### 1005", "#### -1004", "#### 1004.1", "#### 100", "#### 10045", "", in_tool):
        assert not task.evaluate(conversation, answer) and task.reward(conversation, Completion(answer)) == 0.0
    assert (task.kind, task.baseline, task.judged) == ("generative", 0.0, True)


def test_rows_without_a_final_number_are_named(tmp_path: Path) -> None:
    path = write_table(tmp_path / "own.parquet", [problem(1), {"question": "?", "answer": "It is 5."}])
    task = opened("gsm8k", "train", tmp_path, path=path, order_seed=None)
    assert task[0]["messages"][0]["content"] == "How many is 1?"
    with pytest.raises(UserError, match=r"gsm8k: own.parquet, row 1: answer has no final number, #### n"):
        task[1]


def test_all_real_solutions(shared: Path, tmp_path: Path) -> None:
    """8,792 solutions: their numbers, the text put together again, and where the calculator says it otherwise."""
    num, calls, others, without, commas, negative = 0, 0, 0, 0, 0, 0
    for split in ("train", "test"):
        task = opened("gsm8k", split, tmp_path, shared / "data/hub", order_seed=None)
        for index in range(len(task)):
            given = task.row(index)["answer"]
            last = given.rpartition("#### ")[2]
            assert final_number(given) == int(last.replace(",", ""))
            parts, recomputed = solution_parts(given), solution_parts(given, recompute=True)
            marks = {"python": "<<{}=", "python_output": "{}>>", "text": "{}"}
            assert "".join(marks[part["type"]].format(part["text"]) for part in parts) == given
            assert parts[-1]["type"] == "text" and f"#### {last}" in parts[-1]["text"]
            conversation = task[index]
            assert task.evaluate(conversation, conversation["messages"][1]["content"])
            in_it = [part for part in parts if part["type"] == "python"]
            num, calls, without = num + 1, calls + len(in_it), without + (not in_it)
            others += sum(a != b for a, b in zip(parts, recomputed, strict=True))
            commas, negative = commas + ("," in last), negative + (last[0] == "-")
    assert (num, without, commas, negative) == (8_792, 95 + 18, 79 + 14, 3 + 2)
    assert len(opened("gsm8k", "test", tmp_path, shared / "data/hub", config="socratic")) == 1_319
    # 6,637 results differ in form, 852 in the last digits of a float, and one is 3/4.
    assert (calls, others) == (27_998, 6_637 + 852 + 1)
