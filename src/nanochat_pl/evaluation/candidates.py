"""Tokens whose probability is asked for, and the answer: plain data, which prompts are made of without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_SAMPLES = 1000  # answers to a problem


@dataclass(frozen=True)
class Candidate:
    """Tokens to score behind a beginning.

    Attributes:
        ids: all tokens, the beginning included.
        start, end: the scored ones are ``ids[start:end]``, 1 <= start <= end <= len(ids). What follows is not read.
    """

    ids: Sequence[int]
    start: int
    end: int


@dataclass(frozen=True)
class Score:
    """What a model says of a candidate.

    Attributes:
        nats: summed over the scored tokens; 0 where there are none.
        num_tokens: of the scored span.
        greedy: whether every scored token is the most probable one (of equals the one with the lowest id).
    """

    nats: float
    num_tokens: int
    greedy: bool


def common_length(rows: Sequence[list[int]] | Sequence[tuple[int, ...]]) -> int:
    """Tokens with which all rows begin."""
    first, last = (min(rows), max(rows)) if rows else ((), ())  # what these two share, all between them do
    return next((n for n, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
