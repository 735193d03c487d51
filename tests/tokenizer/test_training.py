"""Training: what is learnt, what is read, and what is refused."""

from __future__ import annotations

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build
from nanochat_pl.tokenizer import TokenizerSettings, train_tokenizer
from nanochat_pl.tokenizer.ranks import MAX_TOKEN_BYTES, merges_of
from tests.tokenizer.conftest import TEXTS


def test_the_most_frequent_pair_comes_first() -> None:
    tokenizer = train_tokenizer(["abab abab abab"], TokenizerSettings(vocab_size=267))
    assert tokenizer.tokens[:256] == tuple(bytes([value]) for value in range(256))
    assert tokenizer.tokens[256:] == (b"ab", b"abab")
    assert tokenizer.encode("abab") == [257]


def test_the_same_texts_give_the_same_tokenizer() -> None:
    settings = TokenizerSettings(vocab_size=330)
    assert train_tokenizer(TEXTS, settings).fingerprint == train_tokenizer(iter(TEXTS), settings).fingerprint


def test_every_token_is_reached_by_merging_earlier_ones() -> None:
    tokens = train_tokenizer(TEXTS, TokenizerSettings(vocab_size=400)).tokens
    assert [left + right for left, right in merges_of(tokens)] == list(tokens[256:])


def test_merges_never_cross_the_pieces_of_the_split_pattern() -> None:
    tokenizer = train_tokenizer(["12345 12345 67890 the end, the end\n" * 5], TokenizerSettings(vocab_size=275))
    for token in tokenizer.tokens[256:]:
        text = token.decode()
        assert not any(character.isdigit() for character in text) or len(text) <= 2
        assert " " not in text[1:]


def test_bytes_alone_are_a_tokenizer() -> None:
    tokenizer = train_tokenizer([], TokenizerSettings(vocab_size=265))
    assert tokenizer.encode("é") == list("é".encode())


def test_text_beyond_the_bounds_is_not_read() -> None:
    settings = TokenizerSettings(vocab_size=266, max_chars=10, max_chars_per_document=4)
    progress: list[int] = []

    def texts():
        yield "abab" + "cd" * 100
        yield "abab" + "cd" * 100
        yield "ab" * 2
        raise AssertionError("a document was read past max_chars")

    tokenizer = train_tokenizer(texts(), settings, progress.append)
    assert tokenizer.tokens[256:] == (b"ab",)
    assert progress == [4, 8, 10]


def test_a_text_too_short_for_the_vocabulary_is_an_error_that_says_what_would_do() -> None:
    with pytest.raises(UserError, match="vocab_size=32768") as caught:
        train_tokenizer(["aabb"], TokenizerSettings())
    assert "no more than 268" in str(caught.value)
    assert train_tokenizer(["aabb"], TokenizerSettings(vocab_size=268)).vocab_size == 268


def test_the_advised_size_has_half_of_the_pairs() -> None:
    """Half of all was advised: that is no pair at all where there are few."""
    with pytest.raises(UserError, match=r"no more than 274\.") as caught:
        train_tokenizer(["abcdefghi abcdefghi"], TokenizerSettings(vocab_size=400))
    assert "Set tokenizer.vocab_size=269 or so" in caught.value.fix


def test_settings_have_bounds() -> None:
    with pytest.raises(UserError, match="below 265"):
        build(TokenizerSettings, {"vocab_size": 264}, "tokenizer")
    with pytest.raises(UserError, match="max_chars"):
        build(TokenizerSettings, {"max_chars": 0}, "tokenizer")


def test_unpaired_surrogates_do_not_stop_the_training() -> None:
    tokenizer = train_tokenizer(["\ud800\ud800 \ud800\ud800"], TokenizerSettings(vocab_size=267))
    assert tokenizer.tokens[257] == "\ufffd".encode()


def test_tokens_have_a_longest_length() -> None:
    text = "-" * 4 * MAX_TOKEN_BYTES
    with pytest.raises(UserError, match="no more than"):
        train_tokenizer([text], TokenizerSettings(vocab_size=300))
    # 265, and one for each doubling of a line of dashes: 2, 4, 8 …
    reached = 265 + (MAX_TOKEN_BYTES // 2).bit_length() - 1
    tokenizer = train_tokenizer([text], TokenizerSettings(vocab_size=reached))
    assert max(map(len, tokenizer.tokens)) == MAX_TOKEN_BYTES // 2
