"""CORE against ``golden/core.json``: prompts, spans and outcomes of all tasks of the evaluation bundle at hand."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from nanochat_pl.evaluation.core.evaluate import CoreBundle, ask, open_core
from nanochat_pl.evaluation.core.prompts import Problem, choose_shots, is_right, make_question, render, render_unsolved
from nanochat_pl.evaluation.core.settings import CoreSettings
from nanochat_pl.evaluation.scoring import score
from tests.helpers.small_engine import golden_bundle

TASKS = 20


@functools.cache
def cases(golden: Path) -> list[dict[str, Any]]:
    return json.loads((golden / "core.json").read_text(encoding="utf-8"))


@functools.cache
def opened(shared: Path) -> CoreBundle:
    return open_core(CoreSettings(path=str(shared / "data/eval_bundle"), max_per_task=40), shared, None)


def test_all_tasks_have_golden_values(golden: Path, shared: Path) -> None:
    labels = [case["label"] for case in cases(golden)]
    assert labels[:-1] == list(opened(shared).tasks) and len(labels) == TASKS + 1
    assert opened(shared).missing == ("jeopardy", "agi_eval_lsat_ar")


@pytest.mark.parametrize("number", range(TASKS))
def test_prompts_spans_and_outcomes(golden: Path, shared: Path, number: int) -> None:
    case, bundle = cases(golden)[number], opened(shared)
    model = golden_bundle(golden)
    task, asked = bundle.by_name[case["label"]], ask(bundle, case["label"])
    assert (task.kind, task.num_shots, task.delimiter) == (
        case["task_type"],
        case["num_fewshot"],
        case["continuation_delimiter"],
    )
    assert len(asked.problems) == min(40, len(asked.problems))
    problems = asked.problems[:8]
    shots = [choose_shots(asked.pool, n, task.num_shots) for n in range(len(problems))]
    reach = model.net.config.rotary_reach
    questions = [
        make_question(model.tokenizer, task.kind, problem, before, task.delimiter, reach)
        for problem, before in zip(problems, shots, strict=True)
    ]
    prompts = render(problems[0], shots[0], task.delimiter)
    if task.kind == "language_modeling":
        prompts = [render_unsolved(problems[0], shots[0], task.delimiter), *prompts]
    assert len(prompts) == len(case["prompts_of_item_0"])
    assert all(one.endswith(end) for one, end in zip(prompts, case["prompts_of_item_0"], strict=True))
    candidates = questions[0].candidates
    assert [len(each.ids) for each in candidates] == case["prompt_lengths_in_tokens"]
    assert [each.start for each in candidates] == case["start"]
    assert [each.end for each in candidates] == case["end"]
    found = score(model.net, [question.candidates for question in questions])
    outcomes = [is_right(task.kind, problem, scores) for problem, scores in zip(problems, found, strict=True)]
    assert outcomes == case["correct_first"]


def test_language_modelling_that_comes_out_both_ways(golden: Path) -> None:
    case, model = cases(golden)[-1], golden_bundle(golden)
    problems = [Problem(n, (row["context"].strip(),), (row["continuation"],), 0) for n, row in enumerate(case["items"])]
    questions = [make_question(model.tokenizer, "language_modeling", each, [], " ", 5120) for each in problems]
    found = score(model.net, [question.candidates for question in questions])
    assert [scores[0].greedy for scores in found] == case["correct"]
