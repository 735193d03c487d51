"""How much of a prompt a model reads: the one rule for chat tasks and the harness."""

from __future__ import annotations

from collections.abc import Sequence


def max_tokens_read(reach: int, max_tokens: int) -> int:
    """Tokens of a prompt that leave room for an answer of ``max_tokens``, or for as much as half of the positions."""
    return max(reach - max_tokens, reach // 2, 1)


def shortened(ids: Sequence[int], most: int) -> tuple[list[int], bool]:
    """A prompt of ``most`` tokens (at least one), and whether it was longer: what is too much is cut behind bos."""
    excess = len(ids) - most
    return ([ids[0], *ids[1 + excess :]], True) if excess > 0 else (list(ids), False)
