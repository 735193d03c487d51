"""Answers that are things in an order, judged place by place: numbers that were sorted, letters that were reversed."""

from __future__ import annotations

from collections.abc import Sequence


def reward_of_places(expected: Sequence[str], given: Sequence[str], partial: bool) -> float:
    """1 for the very same things in the same places, else 0, or the share of places that are right.

    Args:
        expected: the right answer, not empty.
        given: the answer; too much and too little are wrong places.
        partial: whether some right places are worth something.
    """
    if not partial:
        return float(list(given) == list(expected))
    right = sum(one == other for one, other in zip(expected, given, strict=False))
    return right / max(len(expected), len(given))
