"""Tasks whose problems several processes share, and samples of each problem."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.distributed import collectives
from nanochat_pl.engine import Engine, readable
from nanochat_pl.evaluation.chat_tasks import evaluate_task, item_of
from nanochat_pl.evaluation.results import TaskResult, make_result, to_plain
from nanochat_pl.tasks import Task
from nanochat_pl.tasks.base import conversation_of, text_of
from tests.evaluation.test_categorical import Letters
from tests.helpers.processes import run
from tests.helpers.random_model import random_bundle

SAMPLED = {"num_samples": 3, "temperature": 1.0, "max_tokens": 5}


class Even(Task):
    """Right is what has an even number of characters: a model that has learnt nothing does it now and then."""

    def __init__(self, size: int = 12, questions: int = 1000, fails_on: int | None = None) -> None:
        super().__init__("even", "test", size)
        self._questions, self._fails_on, self.num_judged = questions, fails_on, []

    def conversation(self, index):
        return conversation_of(f"{index % self._questions}?", "ok")

    def evaluate(self, conversation, answer):
        return len(text_of(answer)) % 2 == 0

    def evaluate_all(self, conversations, answers):
        if self._fails_on == collectives.rank():
            raise UserError("the judge is ill")
        self.num_judged.append(len(answers))
        return super().evaluate_all(conversations, answers)


def evaluate(task: Task, **settings: Any) -> TaskResult:
    return evaluate_task(Engine(random_bundle()), task, **settings)


def shared(size: int) -> str:
    torch.set_num_threads(1)
    sampled, letters = evaluate(Even(size), **SAMPLED), evaluate(Letters(size))
    for row in letters.answers:  # rounding differs with what a model reads at the same time
        row["probabilities"] = {letter: round(chance, 2) for letter, chance in row["probabilities"].items()}
    return json.dumps([to_plain(sampled), to_plain(letters)])


@pytest.mark.parametrize("size", [12, 2])
def test_any_number_of_processes_finds_the_same(size):
    """With two problems the third process has nothing to do."""
    alone = shared(size)
    assert run(3, shared, size) == [alone] * 3
    assert json.loads(alone)[0]["n"] == size


def with_an_error(fails_on: int) -> list[str]:
    with pytest.raises(UserError) as raised:
        evaluate(Even(fails_on=fails_on), max_tokens=2)
    return [*raised.value.problems, str(collectives.all_reduce_sum(1))]


def test_an_error_of_one_process_ends_all():
    assert run(2, with_an_error, 1) == [["process 1: the judge is ill", "2"]] * 2


def without_memory(rank: int) -> list[str]:
    engine = Engine(random_bundle())
    if collectives.rank() == rank:
        engine.logits = no_memory  # type: ignore[method-assign]
    with pytest.raises(UserError) as raised:
        evaluate_task(engine, Even(), max_tokens=2)
    return [*raised.value.problems, raised.value.fix, str(collectives.all_reduce_sum(1))]


def no_memory(cache: Any, rows: Any) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_out_of_memory_on_one_process_is_known_to_all():
    assert run(2, without_memory, 1) == [["process 1: even: out of memory.", "Use a smaller batch_size.", "2"]] * 2


def test_several_answers_to_each_problem():
    task, seen = Even(), []
    result = evaluate(task, progress=lambda done, total: seen.append((done, total)), **SAMPLED)
    assert seen[-1] == (12, 12), "progress is told in problems"
    assert task.num_judged == [36], "all answers are judged in one go"
    counts = [sum(each["correct"] for each in row["samples"]) for row in result.answers]
    assert 0 < sum(counts) < 36 and len(set(counts)) > 2, "the test is about problems that come out differently"
    assert result.outcomes == pytest.approx([count / 3 for count in counts])
    assert [row["k"] for row in result.details["pass_at_k"]] == [1, 2, 3]
    first, _, last = result.details["pass_at_k"]
    assert first["value"] == pytest.approx(result.accuracy) and first["stderr"] == pytest.approx(result.stderr)
    assert last["value"] == pytest.approx(sum(count > 0 for count in counts) / 12)
    assert len({each["answer"] for row in result.answers for each in row["samples"]}) > 30, "each draws for itself"
    for row in result.answers:
        assert row["samples"][0] == {"answer": row["answer"], "correct": row["correct"]}


def test_draws_belong_to_a_problem_and_a_seed():
    whole, part = evaluate(Even(), **SAMPLED), evaluate(Even(), limit=4, batch=1, **SAMPLED)
    by_item = {row["item"]: row for row in whole.answers}
    assert [by_item[row["item"]] for row in part.answers] == part.answers
    fewer = evaluate(Even(), **{**SAMPLED, "num_samples": 2})
    assert [row["samples"] for row in fewer.answers] == [row["samples"][:2] for row in whole.answers]
    other = evaluate(Even(), seed=1, **SAMPLED)
    assert other.items == whole.items and other.answers != whole.answers
    narrow = evaluate(Even(), top_k=1, **SAMPLED)
    greedy = evaluate(Even(), max_tokens=5)
    assert [row["answer"] for row in narrow.answers] == [row["answer"] for row in greedy.answers]


def test_answers_without_an_end_are_counted():
    result = evaluate(Even(), max_tokens=3)
    assert result.details["unfinished"] == sum(not ends for ends in ends_within(3))
    assert result.details == {
        "kind": "generative",
        "cut_prompts": 0,
        "num_samples": 1,
        "temperature": 0.0,
        "top_k": None,
        "unfinished": result.details["unfinished"],
        "pass_at_k": [{"k": 1, "value": result.accuracy, "stderr": result.stderr}],
    }


def ends_within(max_tokens: int) -> list[bool]:
    engine = Engine(random_bundle())
    prompts = [engine.tokenizer.render_for_completion(Even()[i]) for i in range(12)]
    return [each.finish_reason == "stop" for each in engine.generate(prompts, max_tokens=max_tokens)]


class Long(Letters):
    """Prompts of 300 to 340 tokens, where the model's positions end at 320."""

    def conversation(self, index):
        return conversation_of(f"{index}" + "x" * (295 + 5 * index), "A")


class LongEven(Even):
    def conversation(self, index):
        return conversation_of(f"{index}" + "x" * (295 + 5 * index), "A")


def test_prompts_past_the_model_s_positions_are_cut_on_the_left_and_counted():
    bundle = random_bundle()
    reach, engine = bundle.net.config.rotary_reach, Engine(bundle)
    whole = [engine.tokenizer.render_for_completion(Long()[i]) for i in range(8)]
    assert reach == 320 and 2 < sum(len(ids) > reach for ids in whole) < 7
    assert evaluate(Long(8)).details["cut_prompts"] == sum(len(ids) > reach for ids in whole)
    past_the_room = sum(len(ids) > reach - 20 for ids in whole)
    assert evaluate(LongEven(8), max_tokens=20).details["cut_prompts"] == past_the_room > 6
    # bos, and room for the answer; however long that may be, half of the positions are the prompt's.
    # Problem 1 fits, but with fewer tokens behind it than an answer may have.
    for number, max_tokens, kept in ((7, 20, 300), (7, 1000, 160), (1, 20, 300)):
        [expected] = engine.generate([[whole[number][0], *whole[number][1 - kept :]]], max_tokens)
        parts = engine.tokenizer.parse_assistant(expected.ids)
        written = readable((part["type"], part["text"]) for part in parts)
        assert evaluate(LongEven(8), max_tokens=max_tokens).answers[number]["answer"] == written


def test_problems_that_a_task_has_several_times_have_names_of_their_own():
    result = evaluate(Even(6, questions=2), max_tokens=2)
    first, second = item_of(Even()[0]), item_of(Even()[1])
    assert result.items == [first, second, f"{first}-2", f"{second}-2", f"{first}-3", f"{second}-3"]


def test_names_of_problems_are_their_content():
    conversation = {**conversation_of("a", "b"), "letters": ["a", "b"]}
    assert item_of(conversation) == item_of(dict(reversed(conversation.items())))
    assert len({item_of(conversation), item_of(conversation_of("a", "c")), item_of(conversation_of("b", "b"))}) == 3


class Unjudged(Even):
    judged = False


@pytest.mark.parametrize(
    ("task", "settings", "problem"),
    [
        (Even(), {"num_samples": 0}, "num_samples=0: must be 1 … 1,000"),
        (Even(), {"num_samples": 2}, "num_samples=2: at temperature=0 all answers to a problem are the same"),
        (Even(), {"temperature": math.inf}, "temperature=inf"),
        (Even(), {"max_tokens": 0}, "max_tokens=0"),
        (Even(), {"batch": 0}, "batch_size=0: must be at least 1"),
        (Letters(), {"batch": 0}, "batch_size=0: must be at least 1"),
        (Unjudged(), {}, "even: nobody can tell what is a right answer"),
    ],
)
def test_what_cannot_be_asked_is_an_error(task, settings, problem):
    with pytest.raises(UserError, match=problem):
        evaluate(task, **settings)


def test_figures_are_those_of_the_outcomes():
    result = evaluate(Even(), **SAMPLED)
    again = make_result("even", result.items, result.outcomes)
    assert (result.accuracy, result.stderr, result.centered) == (again.accuracy, again.stderr, again.centered)
