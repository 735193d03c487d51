"""What a list of tokens must be to make a BPE tokenizer, and the merges that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from reprlib import repr as quote  # shortens

NUM_BYTES = 256
MAX_VOCAB_SIZE = 2**20
MAX_TOKEN_BYTES = 2**9
MAX_PATTERN_LENGTH = 1000


def problem_of_ranks(tokens: Sequence[bytes], pattern: str) -> str | None:
    """What is wrong with the tokens and the pattern of a tokenizer, or None."""
    if not NUM_BYTES <= len(tokens) <= MAX_VOCAB_SIZE:
        return f"{len(tokens):,} tokens: must be {NUM_BYTES} to {MAX_VOCAB_SIZE:,}."
    if sorted(tokens[:NUM_BYTES]) != [bytes([value]) for value in range(NUM_BYTES)]:
        return f"the first {NUM_BYTES} tokens are not the single bytes."
    if len(set(tokens)) != len(tokens):
        return "a token occurs twice."
    if (longest := max(map(len, tokens))) > MAX_TOKEN_BYTES:
        return f"a token has {longest:,} bytes, more than {MAX_TOKEN_BYTES:,}."
    if min(map(len, tokens)) == 0:
        return "a token is empty."
    if not 0 < len(pattern) <= MAX_PATTERN_LENGTH:
        return f"the split pattern has {len(pattern):,} characters: must be 1 to {MAX_PATTERN_LENGTH:,}."
    return None


def merges_of(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair of which each token after the single bytes is made, in the order of ids.

    It is found by encoding the token with the tokens before it: two parts are left. Raises ValueError where more are.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for rank, token in enumerate(tokens[NUM_BYTES:], start=NUM_BYTES):
        parts = _merge(token, ranks, below=rank)
        if len(parts) != 2:
            raise ValueError(f"token {rank}, {quote(token)}, is not made of two earlier tokens but of {quote(parts)}")
        merges.append((parts[0], parts[1]))
    return merges


def _merge(text: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """Byte-pair encoding of one piece by the tokens of a rank lower than ``below``."""
    parts = [text[i : i + 1] for i in range(len(text))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, below) for left, right in pairwise(parts)]
        lowest = min(pairs)
        if lowest >= below:
            break
        i = pairs.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
