"""Accuracy on tasks, and samples."""

from __future__ import annotations

import math

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.engine import Engine
from nanochat_pl.evaluation.chat_tasks import choose_items, evaluate_task
from nanochat_pl.evaluation.samples import DEFAULT_PROMPTS, write_samples
from nanochat_pl.tasks import Task
from nanochat_pl.tasks.base import Content, conversation_of, reference_of, same_last_number, tool_answer
from tests.helpers.small_engine import golden_bundle, scripted_bundle
from tests.helpers.task_tables import opened


def answer_of(n: int) -> str:
    """The model multiplies through the tool, but takes 6 for 7."""
    n = 7 if n == 6 else n
    return f"<|python_start|>{n}*2<|python_end|><|output_start|>{2 * n}<|output_end|>, {2 * n}."


ANSWERS = {f"{n}*2?": answer_of(n) for n in range(10)}


class Doubling(Task):
    """n * 2 for the digits."""

    def __init__(self, size: int = 10) -> None:
        super().__init__("doubling", "test", size)

    def conversation(self, index):
        return conversation_of(f"{index}*2?", tool_answer(f"{index}*2", str(2 * index), f", {2 * index}."))

    def evaluate(self, conversation, answer):
        assert {"type": "python_output"}.items() <= answer[1].items(), "the judge sees tool calls and results"
        return same_last_number(conversation, answer)


@pytest.fixture
def engine() -> Engine:
    return Engine(scripted_bundle(ANSWERS))


def test_accuracy_and_answers(engine):
    seen = []
    result = evaluate_task(engine, Doubling(), batch=4, progress=lambda done, total: seen.append((done, total)))
    assert (result.name, result.n, result.outcomes, result.accuracy) == (
        "doubling",
        10,
        [1.0] * 6 + [0.0] + [1.0] * 3,
        0.9,
    )
    assert result.stderr == pytest.approx(math.sqrt(10 / 12 * 2 / 12 / 12))
    assert result.answers[3] == {
        "item": result.items[3],
        "question": "3*2?",
        "answer": "[3*2 = 6] , 6.",
        "reference": "[3*2 = 6] , 6.",
        "correct": True,
    }
    assert result.answers[6] == {
        "item": result.items[6],
        "question": "6*2?",
        "answer": "[7*2 = 14] , 14.",
        "reference": "[6*2 = 12] , 12.",
        "correct": False,
    }
    assert seen[-1] == (10, 10)


def test_the_same_problems_every_time(engine):
    first = evaluate_task(engine, Doubling(), limit=4)
    assert first.n == 4
    assert first == evaluate_task(engine, Doubling(), limit=4, batch=1)
    assert len({row["question"] for row in first.answers}) == 4


def test_the_choice_of_problems_follows_no_pattern():
    items = choose_items("x", 4000, 1000)
    assert items == sorted(set(items))
    for remainder in range(4):  # tasks that go through four operations in turn
        assert 200 < sum(item % 4 == remainder for item in items) < 300
    assert items != choose_items("y", 4000, 1000)


def test_no_problems_are_an_error(engine):
    """59: a number of problems rounded down to zero, and an accuracy of nothing."""
    with pytest.raises(UserError, match="doubling: this part of the task has no problems"):
        evaluate_task(engine, Doubling(0))
    with pytest.raises(UserError, match="limit=0"):
        evaluate_task(engine, Doubling(), limit=0)
    assert evaluate_task(engine, Doubling(), limit=None).n == 10


MARKS = {
    "text": "{}",
    "python": "<|python_start|>{}<|python_end|>",
    "python_output": "<|output_start|>{}<|output_end|>",
}


def as_written(answer: Content) -> str:
    """An answer as a model writes it."""
    return answer if isinstance(answer, str) else "".join(MARKS[part["type"]].format(part["text"]) for part in answer)


@pytest.mark.parametrize("name", ["gsm8k", "spelling_bee"])
def test_a_model_that_gives_the_reference_solves_real_problems(name, shared, tmp_path):
    """Rendered, written with the calculator, parsed and judged: nothing of an answer is lost on the way."""
    (tmp_path / "words.txt").write_text(
        "\n".join(f"pineapple{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(400))
    )
    settings = {"gsm8k": {"recompute": True}, "spelling_bee": {"words_path": str(tmp_path / "words.txt")}}
    task = opened(name, "test", tmp_path, shared / "data/hub", **settings[name])
    conversations = [task[item] for item in choose_items(name, len(task), 8)]
    answers = {each["messages"][-2]["content"]: as_written(reference_of(each)) for each in conversations}
    right = evaluate_task(Engine(scripted_bundle(answers, sequence_len=512)), task, limit=8, max_tokens=1500)
    assert (right.accuracy, right.n, right.details["unfinished"]) == (1.0, 8, 0)
    assert all(row["answer"] == row["reference"] and " = " in row["answer"] for row in right.answers)
    questions = list(answers)
    mixed_up = {question: answers[other] for question, other in zip(questions, questions[::-1], strict=True)}
    wrong = evaluate_task(Engine(scripted_bundle(mixed_up, sequence_len=512)), task, limit=8, max_tokens=1500)
    assert wrong.items == right.items and wrong.accuracy < 1


def test_samples_of_the_recipe_s_prompts(golden):
    engine = Engine(golden_bundle(golden))
    samples = write_samples(engine, max_tokens=8)
    assert [sample["prompt"] for sample in samples] == list(DEFAULT_PROMPTS)
    prompt = [engine.tokenizer.bos_id, *engine.tokenizer.encode(DEFAULT_PROMPTS[2])]
    assert samples[2]["text"] == engine.generate([prompt], max_tokens=8, tools=False)[0].text
