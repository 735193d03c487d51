"""Letters chosen by their logits."""

from __future__ import annotations

import random

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.engine import Engine
from nanochat_pl.evaluation.answer_letters import letter_ids, letter_probabilities
from nanochat_pl.evaluation.chat_tasks import evaluate_task
from nanochat_pl.tasks import Task
from nanochat_pl.tasks.base import conversation_of
from tests.helpers.random_model import random_bundle
from tests.helpers.small_engine import byte_tokenizer, golden_bundle


def ragged_prompts(count: int = 20) -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(1000) for _ in range(generator.randrange(1, 300))] for _ in range(count)]


@torch.inference_mode()
def one_by_one(net, prompts, letters) -> list[list[float]]:
    """The plain way: all logits of each prompt by itself."""
    last = [net(torch.tensor([prompt]))[0, -1] for prompt in prompts]
    return [logits[torch.tensor(ids)].softmax(0).tolist() for logits, ids in zip(last, letters, strict=True)]


@pytest.mark.parametrize("max_rows", [None, 1, 3])
def test_probabilities_are_those_of_each_prompt_by_itself(golden, max_rows):
    net, prompts = golden_bundle(golden).net, ragged_prompts()
    letters = [random.Random(i).sample(range(1000), 2 + i % 4) for i in range(len(prompts))]
    seen = []
    found = letter_probabilities(net, prompts, letters, max_rows, lambda done, total: seen.append((done, total)))
    for mine, plain in zip(found, one_by_one(net, prompts, letters), strict=True):
        assert mine == pytest.approx(plain, abs=1e-5)
    assert seen[-1] == (20, 20)
    assert letter_probabilities(net, [], []) == []


def test_so_many_prompts_at_once():
    seen = []
    for max_rows in (None, 3):
        letter_probabilities(
            random_bundle().net, [[1, 2, 3]] * 7, [[1, 2]] * 7, max_rows, lambda done, total: seen.append(done)
        )
    assert seen == [7, 3, 6, 7]


def test_near_letters_are_told_apart_in_bfloat16():
    """46: in bfloat16 two logits near each other are the same number, and the first letter would always be taken."""
    bundle = random_bundle(sequence_len=64)
    net = bundle.net.set_compute_dtype(torch.bfloat16)
    prompt = list(b"Which?")
    with torch.no_grad():
        hidden = net.hidden(torch.tensor([prompt]))[0, -1].float()
        net.lm_head.weight[65] = hidden
        net.lm_head.weight[66] = hidden * (1 + 1e-4)  # a little more likely
        logits = net(torch.tensor([prompt]))[0, -1]
    assert logits[65] == logits[66], "the test is about a tie"
    [chances] = letter_probabilities(net, [prompt], [[65, 66]])
    assert chances[1] > chances[0]


def test_a_model_that_gives_no_numbers_is_no_guessing():
    """The first letter was taken of all problems: the accuracy of guessing, without a word."""
    bundle = random_bundle(sequence_len=64)
    with torch.no_grad():
        bundle.net.lm_head.weight.fill_(torch.nan)
    with pytest.raises(UserError, match=r"^letters: the model's outputs are not finite numbers"):
        evaluate_task(Engine(bundle), Letters())


def test_a_letter_is_one_token():
    assert letter_ids(byte_tokenizer(), ["A", "B", "9"], "x") == [65, 66, 57]
    with pytest.raises(UserError, match="capitals: the tokenizer has no single token for 'ü', 'Paris', so"):
        letter_ids(byte_tokenizer(), ["A", "ü", "Paris"], "capitals")


class Letters(Task):
    """Questions with three or four letters each; A is right."""

    kind = "categorical"
    baseline = 0.3
    remark = "A is always right"

    def __init__(self, size: int = 30) -> None:
        super().__init__("letters", "test", size)

    def conversation(self, index):
        return conversation_of(f"Which one, {index**5}?", "A")

    def letters(self, conversation):
        return "ABCD" if len(conversation["messages"][0]["content"]) % 2 else "ABC"

    def evaluate(self, conversation, answer):
        return answer == "A"


def test_a_task_answered_by_letters():
    bundle, task, seen = random_bundle(sequence_len=64), Letters(), []
    result = evaluate_task(Engine(bundle), task, progress=lambda done, total: seen.append((done, total)))
    tokenizer = bundle.tokenizer
    prompts = [tokenizer.render_for_completion(task[i]) for i in range(30)]
    letters = [task.letters(task[i]) for i in range(30)]
    plain = one_by_one(bundle.net, prompts, [[ord(letter) for letter in each] for each in letters])
    expected = [each[chances.index(max(chances))] for each, chances in zip(letters, plain, strict=True)]
    assert [row["answer"] for row in result.answers] == expected
    assert len(set(expected)) >= 3, "the test is about different answers"
    assert result.outcomes == [float(letter == "A") for letter in expected]
    assert result.baseline == 0.3 and result.centered == pytest.approx((result.accuracy - 0.3) / 0.7)
    assert result.details == {"kind": "categorical", "cut_prompts": 0, "remark": "A is always right"}
    row = result.answers[3]
    assert row["question"] == "Which one, 243?" and row["reference"] == "A" and row["item"] == result.items[3]
    assert row["probabilities"] == pytest.approx(dict(zip(letters[3], plain[3], strict=True)), abs=1e-4)
    assert seen[-1] == (30, 30)
    # Neither the batch nor the settings of written answers matter.
    assert evaluate_task(Engine(bundle), task, batch=2, num_samples=4, temperature=1.0) == result
