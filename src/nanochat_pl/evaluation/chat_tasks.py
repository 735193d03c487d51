"""Share of a task's problems that a chat model answers rightly: greedy answers, judged by the task itself."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.engine import Engine, readable
from nanochat_pl.tasks import Task


@dataclass(frozen=True)
class TaskResult:
    """How a model did on one task.

    Attributes:
        name: the task's.
        n: problems asked.
        correct: of them answered rightly.
        accuracy: correct / n.
        stderr: standard error of the accuracy, with one right and one wrong answer added: all right of a few problems
            is no certainty.
        answers: one row per problem: question, answer, reference (tool calls as ``[2*21][= 42]``), correct.
    """

    name: str
    n: int
    correct: int
    accuracy: float
    stderr: float
    answers: list[dict[str, Any]] = field(repr=False)


def evaluate_task(
    engine: Engine,
    task: Task,
    limit: int | None = 200,
    max_tokens: int = 256,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Let the model answer problems of a task, greedily and with the calculator.

    Args:
        engine: the model.
        task: conversations whose last message is the reference answer, and a judge.
        limit: problems asked: a seeded choice, the same for every model; None: all.
        max_tokens: most new tokens of an answer.
        batch: answers written at the same time; None: the engine's default. Memory and time only.
        progress: called with (answers finished, all) when some have finished.

    Raises:
        UserError: the task has no problems, or ``limit`` is below 1.
    """
    items = choose_items(task.name, len(task), limit)
    conversations = [task[item] for item in items]
    prompts = [engine.tokenizer.render_for_completion(conversation) for conversation in conversations]
    results = engine.generate(prompts, max_tokens=max_tokens, max_batch=batch, progress=progress)
    answers = []
    for conversation, result in zip(conversations, results, strict=True):
        parts = engine.tokenizer.parse_assistant(result.ids)
        question, reference = (message["content"] for message in conversation["messages"][-2:])
        answers.append(
            {
                "question": question,
                "answer": _readable(parts),
                "reference": _readable(reference),
                "correct": task.evaluate(conversation, parts),
            }
        )
    return summarize(task.name, answers)


def choose_items(name: str, size: int, limit: int | None) -> list[int]:
    """The problems to ask, in order: all, or a seeded sample of ``limit`` (one that follows no pattern in the task).

    Raises:
        UserError: there is nothing to ask: an accuracy over no problems would be no number.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: {name} must be asked at least one problem.", fix="Use null for all.")
    if size == 0:
        raise UserError(f"{name}: this part of the task has no problems.", fix="Take it out of the evaluation's tasks.")
    if limit is None or limit >= size:
        return list(range(size))
    return sorted(random.Random(f"problems of {name}").sample(range(size), limit))


def summarize(name: str, answers: list[dict[str, Any]]) -> TaskResult:
    """Figures of judged answers (at least one)."""
    n = len(answers)
    correct = sum(answer["correct"] for answer in answers)
    supposed = (correct + 1) / (n + 2)
    return TaskResult(name, n, correct, correct / n, math.sqrt(supposed * (1 - supposed) / (n + 2)), answers)


def _readable(content: str | Sequence[Mapping[str, str]]) -> str:
    """An assistant's message as one text, tool calls and results in brackets."""
    return content if isinstance(content, str) else "".join(readable(part["type"], part["text"]) for part in content)
