"""The comparison with other tokenizers: metrics where they are at hand, a word where not, never a wait."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiktoken
import tiktoken.load

from nanochat_pl.common.errors import UserError
from nanochat_pl.tokenizer import Tokenizer, comparison
from nanochat_pl.tokenizer.comparison import (
    KINDS,
    cached_others,
    compare_tokenizers,
    comparison_table,
    fetch_others,
    texts_of_kinds,
)

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
    assert all(
        row.skipped.startswith("skipped: not in tiktoken's cache; nanochat-pl download tokenizers=true")
        for row in others
    )


def test_others_are_compared_where_they_can_be_loaded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tokenizer._encoding)
    ours, *others = compare_tokenizers(tokenizer, TEXTS, allow_download=True)
    assert [row.bytes_per_token for row in others] == [ours.bytes_per_token] * 2
    assert [row.vocab_size for row in others] == [tokenizer.vocab_size] * 2


def test_a_failing_or_hanging_network_is_reported(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()

    def get_encoding(name: str) -> tiktoken.Encoding:
        if name == "gpt2":
            raise ConnectionError("no network")
        hanging.wait(60)
        raise ConnectionError("nobody waits for this")

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    start = time.perf_counter()
    rows = compare_tokenizers(tokenizer, TEXTS, allow_download=True, timeout_seconds=0.2)
    assert time.perf_counter() - start < 30
    hanging.set()
    assert rows[1].skipped == "skipped: it cannot be loaded: no network"
    assert rows[2].skipped == "skipped: it was not loaded within 0.2 seconds"


def test_a_fault_of_the_loading_thread_is_raised_and_not_waited_for(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {}[name])
    with pytest.raises(KeyError, match="gpt2"):
        compare_tokenizers(tokenizer, TEXTS, allow_download=True, timeout_seconds=60)


def test_there_is_a_text_of_each_kind() -> None:
    texts = texts_of_kinds()
    assert tuple(texts) == KINDS and all(1_000 < len(text.encode()) < 4_000 for text in texts.values())
    assert sum("가" <= sign <= "힣" for sign in texts["korean"]) > 400
    compile(texts["code"], "code.txt", "exec")


def test_the_table_says_how_many_tokens_are_needed_for_one_of_theirs(tokenizer: Tokenizer) -> None:
    texts = {"all": "abab" * 10, "nothing": ""}
    metrics = {"ours": 4.0, "GPT-2": 2.0, "GPT-4": 5.0}
    rows = [comparison.ComparisonRow(name, 1, {"all": metric}) for name, metric in metrics.items()]
    heading, lines = comparison_table(rows, texts)
    assert heading[-2:] == ["ours for one token of GPT-2", "ours for one token of GPT-4"]
    assert lines == [["all", 40, 4.0, 2.0, 5.0, 0.5, 1.25]]
    heading, lines = comparison_table([rows[0], comparison.ComparisonRow("GPT-2", 0, {}, "skipped: x")], texts)
    assert (heading, lines) == (["text", "bytes", "bytes per token, ours"], [["all", 40, 4.0]])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, bytes | None]]:
    """A server of small files in the formats of the published ones; None: it fails. tiktoken's own cache is another."""
    pairs = [bytes([n]) for n in (*range(33, 127), *range(161, 173), *range(174, 256))]
    pairs += [bytes([n]) for n in range(256) if bytes([n]) not in pairs]  # the order that GPT-2's files have
    spelled = {value: chr(value[0]) if n < 188 else chr(256 + n - 188) for n, value in enumerate(pairs)}
    files: dict[str, bytes | None] = {
        "/vocab.bpe": b"#version: 0.2\ne l\nel l\n",
        "/encoder.json": json.dumps(
            {**{spelled[value]: n for n, value in enumerate(pairs)}, "el": 256, "ell": 257, "<|endoftext|>": 258}
        ).encode(),
        "/cl100k.tiktoken": b"".join(
            base64.b64encode(token) + f" {n}\n".encode() for n, token in enumerate([*pairs, b"th", b"the"])
        ),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path)
            self.send_response(200 if content else 503)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, format: str, *args: object) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{http.server_port}"
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items() if content}

    def gpt2() -> dict[str, object]:
        names = ("/vocab.bpe", "/encoder.json")
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
            *(url + name for name in names), *(hashes[name] for name in names)
        )
        special = {"<|endoftext|>": len(ranks)}
        return {"name": "gpt2", "pat_str": r"\w+|\W+", "mergeable_ranks": ranks, "special_tokens": special}

    def cl100k_base() -> dict[str, object]:
        name = "/cl100k.tiktoken"
        ranks = tiktoken.load.load_tiktoken_bpe(url + name, expected_hash=hashes[name])
        return {"name": "cl100k_base", "pat_str": r"\w+|\W+", "mergeable_ranks": ranks, "special_tokens": {}}

    monkeypatch.setattr("tiktoken.registry.ENCODING_CONSTRUCTORS", {"gpt2": gpt2, "cl100k_base": cl100k_base})
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    others = (
        comparison._Other("GPT-2", "gpt2", (f"{url}/vocab.bpe", f"{url}/encoder.json")),
        comparison._Other("GPT-4", "cl100k_base", (f"{url}/cl100k.tiktoken",)),
    )
    monkeypatch.setattr(comparison, "_OTHERS", others)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield files
    http.shutdown()
    http.server_close()


def test_what_is_fetched_once_is_compared_with_from_then_on(
    tokenizer: Tokenizer, server: dict[str, bytes | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cached_others() == []
    assert fetch_others() == (tmp_path / "tiktoken", ["GPT-2", "GPT-4"])
    assert cached_others() == ["GPT-2", "GPT-4"]
    for name in server:
        server[name] = None
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})  # as in the next process
    assert fetch_others() == (tmp_path / "tiktoken", [])
    _, gpt2, gpt4 = compare_tokenizers(tokenizer, {"a": "the ell"})
    assert (gpt2.bytes_per_token, gpt4.bytes_per_token) == ({"a": 7 / 5}, {"a": 7 / 5})
    assert (gpt2.vocab_size, gpt4.vocab_size) == (259, 258)


def test_a_server_that_fails_or_sends_something_else_is_named(
    server: dict[str, bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = server["/cl100k.tiktoken"]
    server["/cl100k.tiktoken"] = None
    with pytest.raises(UserError, match=r"^GPT-4: it cannot be loaded: 503 .*\n.*TIKTOKEN_CACHE_DIR"):
        fetch_others()
    assert cached_others() == ["GPT-2"], "what came is kept"
    server["/cl100k.tiktoken"] = b"YQ== 0\n"
    with pytest.raises(UserError, match="GPT-4: it cannot be loaded: Hash mismatch"):
        fetch_others()
    server["/cl100k.tiktoken"] = good
    assert fetch_others()[1] == ["GPT-4"]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR: is empty, so tiktoken keeps no file"):
        fetch_others()
