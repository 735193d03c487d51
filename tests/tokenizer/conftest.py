"""Tokenizers for the tests of this package: the golden one, and a small one trained here."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat_pl.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer
from tests.reference.golden_tokenizer import load_golden_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind at all.\n",
    "def add(a, b):\n    return a + b  # 12345 + 678\n",
    "Größe, naïve, ¿qué tal?, 你好世界, привет мир 🌍🌍\n\n\t",
    "It's the 3rd of May 2024; they'll pay $1,234.56 -- won't they?\n",
] * 3


@pytest.fixture(scope="session")
def golden_tokenizer(golden: Path) -> Tokenizer:
    return load_golden_tokenizer(golden)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Trained on the few texts above: 320 ids, most of them bytes and short words."""
    return train_tokenizer(TEXTS, TokenizerSettings(vocab_size=320))
