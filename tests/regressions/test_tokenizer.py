"""Bugs of tokenizers: bytes miscounted, patterns that differ, files that are programs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.convert.nanochat.safe_unpickle import read_encoding
from nanochat_pl.tokenizer import SPLIT_PATTERN, Tokenizer, TokenizerSettings, train_tokenizer
from tests.helpers.small_engine import byte_tokenizer
from tests.tokenizer.test_bpe import ODD_TEXTS, random_texts

BYTES = [bytes([value]) for value in range(256)]
# Three digits, blanks and line ends again and again: a pattern that joins them makes tokens of them.
TEXT = "In 1999 there were 123123123 of them,   1000 a day;\n\n\tthey'll say 'twas 365.\n" * 200


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([TEXT], TokenizerSettings(vocab_size=300))


def test_bytes_are_counted_on_raw_bytes(trained: Tokenizer) -> None:
    """Counted on decoded text, a token that is half a character had three bytes, those of U+FFFD."""
    assert trained.token_bytes[trained.encode("\u2022")].tolist() == [1, 1, 1]
    half = Tokenizer([*BYTES, "🌍".encode()[:2], "🌍".encode()[:3]], SPLIT_PATTERN)
    assert half.token_bytes[half.encode("🌍")].tolist() == [3, 1]
    assert not half.token_bytes.flags.writeable
    for tokenizer in (trained, half, byte_tokenizer()):
        assert tokenizer.token_bytes[tokenizer.bos_id :].tolist() == [0] * 9
        for text in ODD_TEXTS + random_texts(300):
            ids = tokenizer.encode(text)
            assert tokenizer.token_bytes[ids].sum() == len(text.encode()) and tokenizer.decode(ids) == text


def test_the_pattern_of_the_training_is_that_of_the_use(trained: Tokenizer) -> None:
    """A tokenizer was trained with one pattern and run with another: tokens that no text ever gives."""
    learnt = [token for token in trained.tokens[256:] if token.decode("utf-8", "ignore").encode() == token]
    assert len(learnt) > 20 and b"12" in learnt and b"123" not in learnt
    for token in learnt:
        assert trained.encode(token.decode()) == [trained.tokens.index(token)], token


def test_the_pattern_is_read_from_the_file(tmp_path: Path) -> None:
    """Where the code named the pattern, a tokenizer trained with another one was run with the wrong one."""
    pattern = SPLIT_PATTERN.replace("{1,2}", "{1,3}")
    tokens = [*BYTES, b"12", b"123"]
    Tokenizer(tokens, pattern).save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.pattern == pattern
    assert loaded.encode("1234") == [257, ord("4")]
    assert Tokenizer(tokens, SPLIT_PATTERN).encode("1234") == [256, ord("3"), ord("4")]


class Program:
    """What a pickle can be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("read", [Tokenizer.load, read_encoding])
def test_a_tokenizer_is_never_a_program(read: object, tmp_path: Path) -> None:
    """A pickled tokenizer ran whatever its writer wanted, with the rights of whoever chatted with the model."""
    path, traces = tmp_path / "tokenizer.pkl", tmp_path / "traces"
    path.write_bytes(pickle.dumps(Program(traces)))
    with pytest.raises(UserError, match=r"tokenizer\.pkl"):
        read(path)  # type: ignore[operator]
    assert not traces.exists()
    pickle.loads(path.read_bytes())
    assert traces.exists(), "it is one"
