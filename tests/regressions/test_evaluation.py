"""Bugs of evaluations: metrics of a model that it does not have, and runs that end on a small task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.evaluation.candidates import Candidate
from nanochat_pl.evaluation.core.evaluate import ask, evaluate_core_task
from nanochat_pl.evaluation.core.prompts import choose_shots
from nanochat_pl.evaluation.scoring import score
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.prefix_tree import PrefixTree, SharedPrefix
from tests.evaluation.test_core import MC, model, opened, write_bundle
from tests.helpers.models import perturbed, random_ids, tiny_config

CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def net() -> GPT:
    """Windows of 3 and 32 positions, grouped keys, rotary tables for 320."""
    return perturbed(tiny_config()).requires_grad_(False).eval()


def texts_of(row: SharedPrefix) -> list[list[int]]:
    return [[*row.trunk, *branch] for branch in row.branches or [()]]


@pytest.mark.parametrize("lengths", [[5], [40], [130, 3], [300, 2, 170], [1, 1, 1]])
def test_branches_see_the_window_of_their_own_text(net: GPT, lengths: list[int]) -> None:
    """Decoding on a cache looked at all keys and not at the layer's window: metrics changed with the way of reading.

    Trunks shorter and longer than the windows and than a block of queries, branches of which each is scored alone.
    """
    ids = random_ids(net.config, 2000).tolist()
    rows = []
    for length in lengths:
        trunk, rest = ids[:length], ids[length:]
        branches = [] if length == 2 else [rest[:1], rest[5:25], rest[30 : 30 + 150 if length < 150 else 40], ()]
        rows.append(SharedPrefix(trunk, branches))
    tree = PrefixTree(rows)
    hidden = net.hidden_of_tree(tree)[0]
    for row, starts in zip(rows, tree.starts, strict=True):
        depth = len(row.trunk)
        for number, text in enumerate(texts_of(row), 1):
            whole = net.hidden(torch.tensor([text]))[0]
            torch.testing.assert_close(hidden[starts[0] : starts[0] + depth], whole[:depth], **CLOSE)
            if row.branches:
                branch = hidden[starts[number] : starts[number] + len(text) - depth]
                torch.testing.assert_close(branch, whole[depth:], **CLOSE)


@pytest.mark.parametrize("length", [1010, 1300])
def test_rows_past_the_reach_of_plain_products(length: int) -> None:
    """The same with the fused kernel, which a CPU takes for long rows."""
    net = perturbed(tiny_config(sequence_len=160, rotary_reach=1600)).requires_grad_(False).eval()
    ids = random_ids(net.config, length + 60).tolist()
    row = SharedPrefix(ids[:length], [ids[length : length + 20], ids[length + 20 : length + 50]])
    tree = PrefixTree([row, SharedPrefix(ids[7:40], [ids[3:5]])])
    hidden = net.hidden_of_tree(tree)[0]
    for number, text in enumerate(texts_of(row), 1):
        start = tree.starts[0][number]
        whole = net.hidden(torch.tensor([text]))[0, length:]
        torch.testing.assert_close(hidden[start : start + len(whole)], whole, **CLOSE)


@pytest.mark.parametrize("max_positions", [1, 60, 100, 400, 16_384])
def test_scores_do_not_depend_on_what_is_read_together(net: GPT, max_positions: int) -> None:
    """Logits that came through a cache in chunks differed from those of the whole row."""
    ids = random_ids(net.config, 6, 90).tolist()
    questions = [
        [Candidate([*row[:start], *ids[n][:length]], start, start + length) for n, length in enumerate((3, 20, 1))]
        for row, start in zip(ids, (1, 4, 33, 50, 64, 90), strict=True)
    ]
    found = score(net, questions, max_positions=max_positions)
    for question, scores in zip(questions, found, strict=True):
        for candidate, one in zip(question, scores, strict=True):
            log_probs = net(torch.tensor([list(candidate.ids)]))[0].log_softmax(dim=-1)
            nats = -sum(float(log_probs[n - 1, candidate.ids[n]]) for n in range(candidate.start, candidate.end))
            assert one.nats == pytest.approx(nats, rel=1e-5, abs=2e-4)


@pytest.mark.parametrize("most", [1, 3, 10, 11])
def test_fewer_examples_than_shots(tmp_path: Path, most: int) -> None:
    """Of a task of 32 rows ten were asked, each with ten shots: there were nine others, and the evaluation ended."""
    rows = [{"query": f"Q{n}", "choices": ["yes", "no"], "gold": n % 2} for n in range(32)]
    folder = write_bundle(tmp_path, {"few": MC | {"num_fewshot": [10]}}, {"mc.jsonl": rows})
    bundle = opened(folder, max_per_task=most)
    result = evaluate_core_task(bundle, "few", *model())
    assert result.n == most and result.details["shots_from"] == ("asked" if most > 10 else "file")
    asked = ask(bundle, "few")
    for number, problem in enumerate(asked.problems):
        shots = choose_shots(asked.pool, number, 10)
        assert len({shot.row for shot in shots} - {problem.row}) == 10, "ten others"


def test_a_file_with_too_few_rows_is_named(tmp_path: Path) -> None:
    """With random.sample's own words, after an hour of other tasks."""
    rows = [{"query": f"Q{n}", "choices": ["yes", "no"], "gold": n % 2} for n in range(10)]
    folder = write_bundle(tmp_path, {"few": MC | {"num_fewshot": [10]}}, {"mc.jsonl": rows})
    with pytest.raises(UserError, match=r"mc\.jsonl: has 10 problems, too few for 10 shots"):
        evaluate_core_task(opened(folder), "few", *model())
