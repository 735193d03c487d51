"""Scores of many candidates at once against one forward a candidate, with the whole logits."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.evaluation import scoring
from nanochat_pl.evaluation.candidates import Candidate, Score
from nanochat_pl.evaluation.scoring import batches_by_length, score
from nanochat_pl.model.gpt import GPT
from tests.helpers.models import perturbed, tiny_config

# Nats in float32, summed over up to 60 tokens.
CLOSE = {"rel": 1e-5, "abs": 2e-4}


@pytest.fixture(scope="module")
def net() -> GPT:
    """Windows of 3 and 32 positions, rotary tables for 320; vocabulary of 50."""
    return perturbed(tiny_config()).requires_grad_(False).eval()


def plain(net: GPT, candidate: Candidate) -> Score:
    """The same of the whole logits of one row, token by token."""
    log_probs = net(torch.tensor([list(candidate.ids)]))[0].double().log_softmax(dim=-1)
    span = range(candidate.start, candidate.end)
    nats = -sum(float(log_probs[n - 1, candidate.ids[n]]) for n in span)
    return Score(nats, len(span), all(int(log_probs[n - 1].argmax()) == candidate.ids[n] for n in span))


def require_equal(found: Sequence[Sequence[Score]], net: GPT, questions: Sequence[Sequence[Candidate]]) -> None:
    assert [len(row) for row in found] == [len(question) for question in questions]
    for row, question in zip(found, questions, strict=True):
        for one, candidate in zip(row, question, strict=True):
            expected = plain(net, candidate)
            assert one.nats == pytest.approx(expected.nats, **CLOSE)
            assert (one.num_tokens, one.greedy) == (expected.num_tokens, expected.greedy)


def random_questions(seed: int, count: int = 25) -> list[list[Candidate]]:
    """Beginnings of 1 … 120 tokens, some shared in part only, rests of 0 … 40, spans anywhere."""
    chance = random.Random(seed)
    questions = []
    for _ in range(count):
        beginning = chance.choices(range(50), k=chance.choice([1, 2, 15, 16, 40, 120]))
        question = []
        for _ in range(chance.choice([1, 2, 4])):
            kept = chance.choice([len(beginning), len(beginning), chance.randint(1, len(beginning))])
            ids = [*beginning[:kept], *chance.choices(range(50), k=chance.choice([0, 1, 2, 40]))]
            start = chance.randint(1, len(ids))
            question.append(Candidate(ids, start, chance.choice([len(ids), chance.randint(start, len(ids))])))
        questions.append(question)
    return questions


@pytest.mark.parametrize("max_positions", [1, 150, 16_384])
def test_scores_are_those_of_one_row_at_a_time(net: GPT, max_positions: int) -> None:
    questions = random_questions(max_positions)
    require_equal(score(net, questions, max_positions=max_positions), net, questions)


def test_what_the_model_would_say_is_greedy_until_a_token_differs(net: GPT) -> None:
    ids = [3, 1, 4]
    while len(ids) < 30:
        ids.append(int(net(torch.tensor([ids]))[0, -1].argmax()))
    other = [*ids[:20], (ids[20] + 1) % 50, *ids[21:]]
    questions = [
        [Candidate(ids, 3, 30), Candidate(other, 3, 30)],
        [Candidate(other, 3, 20)],
        [Candidate(other, 20, 21)],
    ]
    found = score(net, questions)
    require_equal(found, net, questions)
    assert [[one.greedy for one in row] for row in found] == [[True, False], [True], [False]]


def test_candidates_of_which_one_begins_the_other(net: GPT) -> None:
    """The span of the shorter one is empty; the longer one's begins in what both share."""
    ids = list(range(40))
    questions = [[Candidate(ids[:30], 30, 30), Candidate(ids, 30, 40)], [Candidate(ids, 1, 40), Candidate(ids, 40, 40)]]
    found = score(net, questions)
    require_equal(found, net, questions)
    assert found[0][0] == Score(0.0, 0, True)
    assert score(net, [[], [Candidate([7], 1, 1)]]) == [[], [Score(0.0, 0, True)]]
    assert score(net, []) == []


def tokens_read(net: GPT, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the number of tokens of each forward."""
    read: list[int] = []
    hidden = net.hidden_of_tree
    monkeypatch.setattr(net, "hidden_of_tree", lambda tree: (read.append(tree.ids.numel()), hidden(tree))[1])
    return read


def test_what_is_shared_is_read_once(net: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    read = tokens_read(net, monkeypatch)
    beginning = [n % 50 for n in range(100)]
    questions = [[Candidate([*beginning, rest, 1], 100, 102) for rest in range(4)] for _ in range(3)]
    require_equal(score(net, questions), net, questions)
    assert read == [3 * (100 + 4)], "each beginning once, each rest up to its last token, no padding"


def test_equal_candidates_are_read_once_and_score_the_same(net: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    read = tokens_read(net, monkeypatch)
    ids = [n % 50 for n in range(60)]
    questions = [[Candidate(ids, 20, 60), Candidate([*ids[:30], 7, 7], 20, 32), Candidate(ids, 20, 60)]]
    found = score(net, questions)
    require_equal(found, net, questions)
    assert found[0][0] == found[0][2] and read == [30 + 29 + 1]


def test_a_row_of_many_branches_is_divided(net: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    read = tokens_read(net, monkeypatch)
    beginning = [n % 50 for n in range(40)]
    questions = [[Candidate([*beginning, n, *[n + 1] * 19, 1], 40, 61) for n in range(9)]]
    require_equal(score(net, questions, max_positions=100), net, questions)
    assert sorted(read) == [40 + 3 * 20] * 3


def test_logits_are_made_only_where_they_score(net: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    head = net.head
    monkeypatch.setattr(net, "head", lambda x: (made.append(len(x)), head(x))[1])
    monkeypatch.setattr(scoring, "default_chunk_tokens", lambda vocab_size, on_cpu: 2)
    beginning = [n % 50 for n in range(100)]
    question = [Candidate([*beginning, rest, 1, 2], 100, 103) for rest in range(4)]
    found = score(net, [question])
    assert sum(made) == 1 + 4 * 2, "the last of the beginning once, then two of each rest"
    assert max(made) <= 2
    monkeypatch.undo()
    require_equal(found, net, [question])


def test_progress_counts_questions(net: GPT) -> None:
    told: list[int] = []
    questions = random_questions(3)
    score(net, questions, max_positions=64, progress=told.append)
    assert sum(told) == len(questions) and len(told) > 2


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (Candidate([1, 2], 0, 2), "no span"),
        (Candidate([1, 2], 1, 3), "no span"),
        (Candidate([1, 2], 2, 1), "no span"),
        (Candidate([], 1, 1), "no span"),
        (Candidate([1, 50], 1, 2), "outside 0 … 49"),
        (Candidate([1, -1], 1, 2), "outside 0 … 49"),
        (Candidate([1] * 322, 1, 322), "end at 320"),
    ],
)
def test_what_cannot_be_scored_is_refused(net: GPT, candidate: Candidate, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(net, [[Candidate([1, 2], 1, 2)], [candidate]])


def test_the_last_position_can_be_predicted(net: GPT) -> None:
    questions = [[Candidate([n % 50 for n in range(321)], 300, 321)]]
    assert score(net, questions)[0][0].num_tokens == 21


def test_batches_hold_rows_of_like_length() -> None:
    chance = random.Random(0)
    lengths = [chance.choice([3, 50, 400, 2000]) + chance.randint(0, 20) for _ in range(300)]
    batches = batches_by_length(lengths, 4096)
    assert sorted(index for batch in batches for index in batch) == list(range(300))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 4096
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    assert [max(lengths[index] for index in batch) for batch in batches] == sorted(
        (max(lengths[index] for index in batch) for batch in batches), reverse=True
    )


def test_batches_of_odd_sizes() -> None:
    assert batches_by_length([], 10) == []
    assert batches_by_length([0, 0], 10) == [[0, 1]]
    assert batches_by_length([50, 7, 60], 10) == [[2], [0], [1]]
    assert batches_by_length([5, 5, 5], 10) == [[0, 1], [2]]
