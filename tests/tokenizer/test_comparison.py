"""The comparison with other tokenizers: figures where they are at hand, a word where not, never a wait."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import tiktoken

from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.tokenizer.comparison import compare_tokenizers

TEXTS = {"prose": "The quick brown fox. " * 20, "bytes": "\x00\x01", "nothing": "", "odd": "\ud800"}


def test_what_is_not_cached_is_skipped_with_a_word(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    ours, *others = compare_tokenizers(tokenizer, TEXTS)
    assert ours.name == "ours" and ours.vocab_size == tokenizer.vocab_size and not ours.skipped
    assert list(ours.bytes_per_token) == ["prose", "bytes", "odd"]
    assert ours.bytes_per_token["prose"] > 1.4
    assert ours.bytes_per_token["bytes"] == 1.0
    assert ours.bytes_per_token["odd"] == 1.0
    assert [row.name for row in others] == ["GPT-2", "GPT-4"]
    assert all(row.skipped.startswith("skipped: not in tiktoken's cache") for row in others)


def test_others_are_compared_where_they_can_be_loaded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tokenizer._encoding)
    ours, *others = compare_tokenizers(tokenizer, TEXTS, allow_download=True)
    assert [row.bytes_per_token for row in others] == [ours.bytes_per_token] * 2
    assert [row.vocab_size for row in others] == [tokenizer.vocab_size] * 2


def test_a_failing_or_hanging_network_is_reported(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def get_encoding(name: str) -> tiktoken.Encoding:
        if name == "gpt2":
            raise ConnectionError("no network")
        time.sleep(3)
        raise ConnectionError("nobody waits for this")

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    start = time.perf_counter()
    rows = compare_tokenizers(tokenizer, TEXTS, allow_download=True, timeout_seconds=0.2)
    assert time.perf_counter() - start < 2
    assert rows[1].skipped == "skipped: it cannot be loaded: no network"
    assert rows[2].skipped == "skipped: it was not loaded within 0.2 seconds"
