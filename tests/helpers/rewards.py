"""Rewards of one's own, as a person writes them: named by ``rl.reward=tests.helpers.rewards.NAME``."""

from __future__ import annotations

from typing import Any


def thirds(conversation: dict[str, Any], completion: Any) -> float:
    """The share of an answer's ids that three divides: something that any model can learn."""
    assert conversation["messages"][-1]["role"] == "assistant"
    return sum(token % 3 == 0 for token in completion.ids) / len(completion.ids)


def of_some(conversation: dict[str, Any], completion: Any) -> float:
    """As thirds for about half of the prompts; the answers to the others are all worth nothing."""
    counts = sum(map(ord, conversation["messages"][-2]["content"])) % 2
    return thirds(conversation, completion) if counts else 0.0


def huge(conversation: dict[str, Any], completion: Any) -> float:
    """As of_some, but with differences that float32 cannot hold."""
    return 1e39 * of_some(conversation, completion)


def constant(conversation: dict[str, Any], completion: Any) -> int:
    """The same for each answer."""
    return 1


def broken(conversation: dict[str, Any], completion: Any) -> float:
    """A mistake."""
    return conversation["answer"]


def words(conversation: dict[str, Any], completion: Any) -> str:
    """No number."""
    return "good"


class Ended:
    """1 for an answer that the model ended itself."""

    def __call__(self, conversation: dict[str, Any], completion: Any) -> bool:
        return completion.finished


class Silent:
    """No reward: it cannot be called."""
