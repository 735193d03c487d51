"""Prompts of CORE: what a model reads of a problem, and which of its tokens are scored.

CORE (DCLM, arXiv 2406.11794) knows three kinds of tasks. All are rendered alike: solved problems (the shots), a blank
line behind each, then the problem: context, delimiter, ending. They differ in where the alternatives are and in what is
scored:

- multiple choice: one context, several endings; scored from the first token in which the prompts differ;
- schema: several contexts, one ending; scored is the longest end that all prompts share;
- language modelling: one of each; scored is the ending, and every token of it has to be the most probable.

Checked against ``golden/core.json``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nanochat_pl.evaluation.candidates import Candidate, Score, common_length
from nanochat_pl.tokenizer import Tokenizer

Kind = Literal["multiple_choice", "schema", "language_modeling"]

SHUFFLE_SEED, SHOTS_SEED = 1337, 1234


@dataclass(frozen=True)
class Problem:
    """A row of a task's file.

    Attributes:
        row: its place in the file, from 0.
        contexts, endings: of each alternative; language modelling has one.
    """

    row: int
    contexts: tuple[str, ...]
    endings: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Question:
    """A problem as the model reads it.

    Attributes:
        cut: tokens left out of the beginning of each.
    """

    candidates: list[Candidate]
    cut: int = 0


def kept_order(num_problems: int, max_per_task: int | None) -> list[int]:
    """The problems that are asked, by their places in the file: the first of a seeded order, the same for all models.

    ``Random(1337).shuffle`` draws by the number of problems alone, so a task's kept problems are a property of it.
    """
    order = list(range(num_problems))
    random.Random(SHUFFLE_SEED).shuffle(order)
    return order[:max_per_task]


def choose_shots(problems: Sequence[Problem], index: int, num_shots: int) -> list[Problem]:
    """The solved problems in front of number ``index``: drawn from all others, seeded by the number."""
    # What is drawn are places among the others; those from ``index`` on are one further in the whole.
    places = random.Random(SHOTS_SEED + index).sample(range(len(problems) - 1), num_shots)
    return [problems[place + (place >= index)] for place in places]


def render(problem: Problem, shots: Sequence[Problem], delimiter: str) -> list[str]:
    """The prompts of a problem, one for each alternative."""
    solved = "".join(f"{_solution(shot, shot.gold, delimiter)}\n\n" for shot in shots)
    return [solved + _solution(problem, n, delimiter) for n in range(len(problem.contexts))]


def render_unsolved(problem: Problem, shots: Sequence[Problem], delimiter: str) -> str:
    """The prompt of a language modelling problem without its ending, blanks at both ends taken off."""
    prompt = render(problem, shots, delimiter)[0]
    return prompt[: len(prompt) - len(problem.endings[0])].strip()


def _solution(problem: Problem, alternative: int, delimiter: str) -> str:
    return f"{problem.contexts[alternative]}{delimiter}{problem.endings[alternative]}"


def make_question(
    tokenizer: Tokenizer, kind: Kind, problem: Problem, shots: Sequence[Problem], delimiter: str, reach: int
) -> Question:
    """Tokens of a problem's prompts, bos in front, and their scored spans.

    Args:
        problem, shots, delimiter: see :func:`render`.
        reach: most tokens of a prompt: longer ones lose their beginning, all alternatives as much of it.
    """
    rows = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in render(problem, shots, delimiter)]
    lengths = [len(row) for row in rows]
    if kind == "multiple_choice":
        starts = [common_length(rows)] * len(rows)
    elif kind == "schema":
        suffix = common_length([row[::-1] for row in rows])
        starts = [length - suffix for length in lengths]
    else:
        unsolved = tokenizer.encode(render_unsolved(problem, shots, delimiter))
        starts = [min(1 + len(unsolved), lengths[0])]
    cut = max(0, max(lengths) - reach)
    candidates = [
        Candidate(row[cut:], max(1, start - cut), max(1, length - cut))
        for row, start, length in zip(rows, starts, lengths, strict=True)
    ]
    return Question(candidates, cut)


def choose(scores: Sequence[Score]) -> int:
    """The alternative of the lowest mean of nats, the first of equals.

    An empty span (of an ending that begins another one) has no mean. As in the published metrics it is then the first
    alternative's if that is it, and else not considered.
    """
    means = mean_nats(scores)
    # No number is below NaN, and NaN is below no number.
    return min(range(len(means)), key=means.__getitem__)


def mean_nats(scores: Sequence[Score]) -> list[float]:
    """Nats a token of each alternative; NaN where none is scored."""
    return [score.nats / score.num_tokens if score.num_tokens else math.nan for score in scores]


def is_right(kind: Kind, problem: Problem, scores: Sequence[Score]) -> bool:
    """Whether the model has solved a problem."""
    return scores[0].greedy if kind == "language_modeling" else choose(scores) == problem.gold
