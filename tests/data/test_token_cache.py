"""The token cache: right, never stale, resumed by shard, and found out when damaged."""

from __future__ import annotations

import errno
import json
import multiprocessing
import multiprocessing.synchronize
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import write_atomically, write_text
from nanochat_pl.data.cache.content_cache import building
from nanochat_pl.data.cache.conversations import build_conversation_cache
from nanochat_pl.data.cache.tokenize import Abandoned
from nanochat_pl.data.cache.tokens import TokenCache, build_token_cache
from nanochat_pl.data.sources.base import DataSettings
from nanochat_pl.data.sources.open import open_source
from tests.helpers.fake_data import ByteTokenizer, ListSource, cache_files

SHARDS = {"a": ["first text", "", "größer"], "b": [], "c": [f"text {i}" for i in range(600)]}


def texts_in(cache: TokenCache) -> list[str]:
    return [bytes_of(cache.tokens(i)).decode("utf-8") for i in range(cache.num_documents)]


def bytes_of(tokens: np.ndarray) -> bytes:
    return bytes(token - 1 for token in tokens.tolist())


def talk(*contents: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def test_documents_come_back_and_keep_their_numbers(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    cache = build_token_cache(ListSource(SHARDS), "train", tokenizer, tmp_path)
    assert texts_in(cache) == [text for texts in SHARDS.values() for text in texts]
    assert cache.lengths.tolist() == [len(text.encode()) for text in texts_in(cache)]
    assert cache.num_tokens == sum(cache.lengths)
    assert bytes_of(cache.tokens(0, 2, 5)) == b"rst"
    assert (cache.locate(2)[0].name, cache.locate(2)[1]) == ("a", 2)
    assert (cache.locate(3)[0].name, cache.locate(3)[1]) == ("c", 0)
    assert cache.tokens(0).dtype == np.uint16
    with pytest.raises(IndexError):
        cache.tokens(603)
    again = build_token_cache(ListSource(SHARDS), "train", tokenizer, tmp_path)
    assert tokenizer.num_texts == 603
    assert texts_in(again) == texts_in(cache) and again.fingerprint == cache.fingerprint


def test_large_vocabularies_have_room(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = 70_000
    tokenizer.encode_batch = lambda texts: [[69_999] for _ in texts]
    cache = build_token_cache(ListSource(SHARDS), "train", tokenizer, tmp_path)
    assert cache.tokens(0).tolist() == [69_999]


def test_another_tokenizer_and_another_text_have_their_own_cache(tmp_path: Path) -> None:
    first = build_token_cache(ListSource({"a": ["one"]}), "train", ByteTokenizer("x"), tmp_path)
    tokenizer = ByteTokenizer("y")
    second = build_token_cache(ListSource({"a": ["one"]}), "train", tokenizer, tmp_path)
    third = build_token_cache(ListSource({"a": ["two"]}), "train", tokenizer, tmp_path)
    assert tokenizer.num_texts == 2
    assert texts_in(third) == ["two"]
    assert len({first.fingerprint, second.fingerprint, third.fingerprint}) == 3


def test_a_build_that_was_stopped_goes_on_with_the_next_shard(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_token_cache(ListSource(SHARDS), "train", ByteTokenizer(fail_at="text 599"), tmp_path)
    assert len(cache_files(tmp_path, "manifest.json")) == 2
    assert not cache_files(tmp_path, "*.tmp.*")
    tokenizer = ByteTokenizer()
    cache = build_token_cache(ListSource(SHARDS), "train", tokenizer, tmp_path)
    assert tokenizer.num_texts == 600
    assert texts_in(cache) == [text for texts in SHARDS.values() for text in texts]


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest"])
def test_a_damaged_file_is_found_and_made_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    whole = texts_in(build_token_cache(ListSource(SHARDS), "train", ByteTokenizer(), tmp_path))
    path = max(cache_files(tmp_path, "tokens.bin"), key=lambda path: path.stat().st_size)
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(bytes(content))
    elif damage == "cut":
        os.truncate(path, 100)
    elif damage == "gone":
        path.unlink()
    else:
        (path.parent / "manifest.json").write_text('{"key": ', encoding="utf-8")
    tokenizer = ByteTokenizer()
    assert texts_in(build_token_cache(ListSource(SHARDS), "train", tokenizer, tmp_path)) == whole
    assert tokenizer.num_texts == 600
    assert "is damaged" in caplog.text and str(path.parent) in caplog.text


def test_damage_is_found_after_the_file_was_once_verified(tmp_path: Path) -> None:
    whole = texts_in(build_token_cache(ListSource(SHARDS), "train", ByteTokenizer(), tmp_path))
    path = max(cache_files(tmp_path, "tokens.bin"), key=lambda path: path.stat().st_size)
    os.utime(path, (1e9, 1e9))  # old enough to be remembered
    build_token_cache(ListSource(SHARDS), "train", ByteTokenizer(), tmp_path)
    assert (path.parent / "tokens.bin.verified").exists()
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, (1e9, 1e9))  # the time of the last change cannot be set back: it tells
    assert texts_in(build_token_cache(ListSource(SHARDS), "train", ByteTokenizer(), tmp_path)) == whole


def test_a_changed_file_of_ones_own_is_tokenized_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    settings = DataSettings(name="local", path=str(path), txt_document_chars=10)
    for text in ("aaaa bbbb cccc dddd eeee", "aaaa bbbb cccc dddd ffff"):
        path.write_text(text, encoding="utf-8")
        os.utime(path, (1e9, 1e9))  # the same time and size as before
        source = open_source(settings, tmp_path / "cache")
        caches = [build_token_cache(source, split, ByteTokenizer(), tmp_path / "cache") for split in ("train", "val")]
        found = sorted(document.strip() for cache in caches for document in texts_in(cache))
        assert found == sorted([text[:10].strip(), text[10:20].strip(), text[20:]])


def test_a_split_without_text_is_an_error_that_names_it(tmp_path: Path) -> None:
    """The loader of an empty train split waited for ever."""
    (tmp_path / "a.jsonl").write_text('{"text": "only one"}\n{"text": ""}\n', encoding="utf-8")
    source = open_source(DataSettings(name="local", path=str(tmp_path / "a.jsonl")), tmp_path / "cache")
    assert texts_in(build_token_cache(source, "val", ByteTokenizer(), tmp_path / "cache"))
    with pytest.raises(UserError, match="left for the train split"):
        build_token_cache(source, "train", ByteTokenizer(), tmp_path / "cache")
    with pytest.raises(UserError, match="left for the val split"):
        build_token_cache(ListSource(SHARDS), "val", ByteTokenizer(), tmp_path)


def test_what_is_done_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int, int]] = []
    cache = build_token_cache(
        ListSource(SHARDS), "train", ByteTokenizer(), tmp_path, progress=lambda *now: told.append(now)
    )
    assert told == sorted(told) and told[-1] == (3, 3, cache.num_tokens)
    assert any(done == 2 for done, _, _ in told)


def _build(folder: str, barrier: multiprocessing.synchronize.Barrier) -> None:
    barrier.wait()
    build_token_cache(ListSource(SHARDS), "train", ByteTokenizer(), Path(folder))


def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=_build, args=(str(tmp_path), barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    tokenizer = ByteTokenizer()
    cache = build_token_cache(ListSource(SHARDS), "train", tokenizer, tmp_path)
    assert tokenizer.num_texts == 0
    assert texts_in(cache) == [text for texts in SHARDS.values() for text in texts]


def test_equal_shards_of_one_source_share_a_folder(tmp_path: Path) -> None:
    """Two threads had the lock of the folder at once, and the same temporary files in it."""
    for attempt in range(10):
        cache_dir, tokenizer = tmp_path / f"cache{attempt}", ByteTokenizer()
        source = ListSource({"a": SHARDS["c"], "b": SHARDS["c"]})  # their fingerprint is that of their texts
        cache = build_token_cache(source, "train", tokenizer, cache_dir, num_threads=2)
        assert texts_in(cache) == 2 * SHARDS["c"]
        assert tokenizer.num_texts == 600, "tokenized once"


def test_a_held_folder_is_waited_for_by_threads_until_they_are_told_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nanochat_pl.data.cache.content_cache._PATIENCE_SECONDS", 0.0)
    looks: list[int] = []

    def check() -> None:
        looks.append(1)
        if len(looks) > 2:
            raise Abandoned

    def second() -> None:
        with building(tmp_path, check):
            raise AssertionError("held twice")

    with ThreadPoolExecutor(1) as threads:
        with building(tmp_path), pytest.raises(Abandoned):
            threads.submit(second).result()
        assert "Waiting for another run" in capsys.readouterr().out
        with building(tmp_path, check):
            pass


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.raises(UserError, match=r"lock: cannot be locked: No locks(.|\n)*paths\.cache"), building(tmp_path):
        pass


def test_writers_with_the_same_process_number_do_not_share_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers number their processes alike and may share a cache."""
    monkeypatch.setattr(os, "getpid", lambda: 7)

    def write(temporary: Path) -> None:
        temporary.write_text("one", encoding="utf-8")
        write_text(tmp_path / "file", "two")

    write_atomically(tmp_path / "file", write)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_conversations_are_rendered_once_cut_and_counted(tmp_path: Path) -> None:
    """Conversations longer than a row filled the packer's buffer: batches without targets, and NaN for ever."""
    conversations = [
        talk("hi", "you"),
        talk("a question of a certain length", "answer past the cut"),
        talk("hello", "an answer that is cut"),
        talk("question only"),
    ]
    for _ in range(2):
        cache = build_conversation_cache(conversations, ByteTokenizer(), 16, tmp_path, "talks")
        assert cache.rendering.num_cut == 2
        assert cache.rendering.num_without_target == 2
        assert cache.lengths.tolist() == [5, 0, 15, 0]
        assert bytes_of(cache.tokens(2)) == b"helloan answer "
        assert cache.shards[0].mask is not None
        assert cache.shards[0].mask.tolist() == [0] * 2 + [1] * 3 + [0] * 5 + [1] * 10
    others = build_conversation_cache(conversations, ByteTokenizer(), 17, tmp_path, "talks")
    assert others.lengths.tolist() == [5, 0, 16, 0]
    exact = build_conversation_cache([talk("hi", "you")], ByteTokenizer(), 6, tmp_path, "talks")
    assert exact.rendering.num_cut == 0


def test_a_byte_of_a_manifest_that_has_changed_is_noticed_wherever_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A key of the facts ended in a TypeError, a digit of them in other metrics."""
    built = build_conversation_cache([talk("hi", "you"), talk("ho", "me")], ByteTokenizer(), 16, tmp_path, "talks")
    (manifest,) = cache_files(tmp_path, "manifest.json")
    whole = manifest.read_bytes()
    for place in range(0, len(whole), 53):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        manifest.write_bytes(bytes(damaged))
        again = build_conversation_cache([talk("hi", "you"), talk("ho", "me")], ByteTokenizer(), 16, tmp_path, "talks")
        assert again.rendering == built.rendering, (place, damaged)
        assert again.lengths.tolist() == built.lengths.tolist()
    assert "is damaged" in caplog.text
    plain = {name: value for name, value in json.loads(whole).items() if name != "check"}
    manifest.write_text(json.dumps(plain), encoding="utf-8")
    build_conversation_cache([talk("hi", "you"), talk("ho", "me")], ByteTokenizer(), 16, tmp_path, "talks")
    assert json.loads(manifest.read_bytes()) == plain, "one of an earlier version is taken as it is"


def test_conversations_that_cannot_be_used_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of 1 conversations has a token to train on"):
        build_conversation_cache([talk("question")], ByteTokenizer(), 16, tmp_path, "talks")
    with pytest.raises(UserError, match=r"talks: conversation 1: messages\[0\]\.role='bot'"):
        wrong = {"messages": [{"role": "bot", "content": "hi"}]}
        build_conversation_cache([talk("a", "b"), wrong], ByteTokenizer(), 16, tmp_path, "talks")
