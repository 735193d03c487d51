"""The tokenizer of the golden checkpoints: a pickled tiktoken Encoding, read without running anything from it."""

from __future__ import annotations

import pickle
from pathlib import Path

from nanochat_pl.tokenizer import Tokenizer


class _Fields:
    """Stands in for tiktoken's Encoding: takes the pickled state and does nothing with it."""

    def __setstate__(self, state: dict) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _Fields
        raise pickle.UnpicklingError(f"{module}.{name} is not admitted")


def load_golden_tokenizer(golden: Path) -> Tokenizer:
    """The tokenizer of golden/nanochat_base (vocabulary of 1,000)."""
    with (golden / "nanochat_base" / "tokenizer" / "tokenizer.pkl").open("rb") as file:
        fields = _Unpickler(file).load().state
    return Tokenizer.from_ranks(fields["mergeable_ranks"], fields["pat_str"], fields["special_tokens"])
