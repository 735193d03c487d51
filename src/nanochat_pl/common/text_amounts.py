"""How much text a training takes, in files, epochs and bytes on the disk: one place for `plan`, `train` and `download`.

Before a text has been read its tokens are estimated from its bytes. All of these are estimates, and said as such.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

# English text, a vocabulary of 32 thousand or more; compressed files of text have less than this share of its bytes.
BYTES_PER_TOKEN = 4.8
COMPRESSED_SHARE = 0.4
# Of the recipe's packing with crop at 2,048 positions.
CROPPED_SHARE = 0.35
# Bytes a token by the logarithm of the vocabulary's size: measured on python_docs below 2^15.
_BYTES_PER_TOKEN = {8: 1.0, 9: 1.85, 10: 2.35, 11: 2.8, 12: 3.3, 13: 3.7, 14: 4.1, 15: BYTES_PER_TOKEN}
# For the index of documents and rows: a piece of a row takes 12 bytes, a document 4, a row 8.
_DOCUMENT_TOKENS = 500
_PIECE_BYTES, _LENGTH_BYTES, _ROW_BYTES = 12, 4, 8


class KnownSet(NamedTuple):
    """A published data set before anything of it is here.

    Attributes:
        files: a glob for those that hold documents.
        num_shards: files to train on.
        shard_bytes: of text in each, about.
    """

    repo: str
    files: str
    num_shards: int
    shard_bytes: float


# The recipe's two corpora; each file holds some 250 million characters.
KNOWN_SETS = {
    "climbmix": KnownSet("karpathy/climbmix-400b-shuffle", "shard_*.parquet", 6_542, 250e6),
    "fineweb_edu": KnownSet("karpathy/fineweb-edu-100b-shuffle", "shard_*.parquet", 1_821, 250e6),
}


def bytes_per_token(vocab_size: int) -> float:
    """About how many bytes of text a token stands for, with a vocabulary of this size."""
    size = min(max(math.log2(vocab_size), 8.0), 15.0)
    low = min(int(size), 14)
    return _BYTES_PER_TOKEN[low] + (size - low) * (_BYTES_PER_TOKEN[low + 1] - _BYTES_PER_TOKEN[low])


def known_set(repo: str | None) -> KnownSet | None:
    """What is known of a data set of the hub by its name."""
    return next((known for known in KNOWN_SETS.values() if known.repo == repo), None)


def tokens_taken(num_tokens: float, crops: bool) -> float:
    """Tokens of text that are read so that so many are trained on.

    Args:
        crops: whether the packer drops the rest of documents that do not fit.
    """
    return num_tokens / (1 - CROPPED_SHARE) if crops else float(num_tokens)


def epochs_of(num_tokens: float, tokens_at_hand: float, crops: bool) -> float:
    """How often a text is read for a training."""
    return tokens_taken(num_tokens, crops) / max(tokens_at_hand, 1)


def shards_for(num_tokens: float, crops: bool, shard_tokens: Iterable[float]) -> int:
    """How many files, from the first, a training reads; all of them where they hold less.

    Args:
        shard_tokens: about how many tokens each file holds, in their order.
    """
    taken, number = tokens_taken(num_tokens, crops), 0
    for number, total in enumerate(itertools.accumulate(shard_tokens), 1):
        if total >= taken:
            return number
    return number


def token_cache_bytes(num_tokens: float, vocab_size: int, sequence_len: int) -> int:
    """About how many bytes of ``paths.cache`` so many tokens take, with the index of their documents and rows."""
    per_token = 2 if vocab_size <= 2**16 else 4
    index = (_PIECE_BYTES + _LENGTH_BYTES) / _DOCUMENT_TOKENS + (_ROW_BYTES + _PIECE_BYTES) / sequence_len
    return round(num_tokens * (per_token + index))
