"""The tokenizer of the golden checkpoints."""

from __future__ import annotations

from pathlib import Path

from nanochat_pl.convert.nanochat.safe_unpickle import read_encoding
from nanochat_pl.tokenizer import Tokenizer


def load_golden_tokenizer(golden: Path) -> Tokenizer:
    """The tokenizer of golden/nanochat_base (vocabulary of 1,000)."""
    state = read_encoding(golden / "nanochat_base" / "tokenizer" / "tokenizer.pkl")
    return Tokenizer.from_ranks(state.mergeable_ranks, state.pat_str, state.special_tokens)
