"""Local files: what they hold, how they are split, and what is said when they are wrong."""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build
from nanochat_pl.data.cache.tokens import build_token_cache
from nanochat_pl.data.files import formats as file_formats
from nanochat_pl.data.packing.rows import validation_rows
from nanochat_pl.data.sources import base as sources
from nanochat_pl.data.sources import local as local_files
from nanochat_pl.data.sources.base import DataSettings, Source, Split
from nanochat_pl.data.sources.open import open_source
from nanochat_pl.tokenizer import TokenizerSettings, train_tokenizer
from tests.helpers.fake_data import ByteTokenizer


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> None:
    pq.write_table(pa.table({column: texts, "id": list(range(len(texts)))}), path, row_group_size=4)


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def opened(path: Path | str, cache_dir: Path, **settings: object) -> Source:
    return open_source(DataSettings(name="local", path=str(path), **settings), cache_dir)


def texts_of(source: Source, split: Split) -> list[str]:
    return [text for shard in source.shards(split) for text in shard.documents()]


def all_texts(source: Source) -> list[str]:
    return sorted(texts_of(source, "train") + texts_of(source, "val"))


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


TEXTS = [f"document {i}: naïve café №{i}" for i in range(60)]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_file_of_each_table_format_gives_its_documents(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"texts{suffix}"
    if suffix == ".parquet":
        write_parquet(path, TEXTS)
    else:
        write_jsonl(tmp_path / "texts.jsonl", TEXTS)
        if suffix == ".jsonl.gz":
            path.write_bytes(gzip.compress((tmp_path / "texts.jsonl").read_bytes()))
        if suffix == ".jsonl.zst":
            path.write_bytes(zstd((tmp_path / "texts.jsonl").read_bytes()))
    source = opened(path, tmp_path / "cache")
    assert all_texts(source) == sorted(TEXTS)
    assert [text for text in TEXTS if text in set(texts_of(source, "train"))] == texts_of(source, "train")


def test_a_folder_is_searched_in_sorted_order_and_a_glob_picks(tmp_path: Path) -> None:
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "in" / ".hidden").mkdir()
    write_jsonl(tmp_path / "in" / "c.jsonl", TEXTS[:20])
    write_parquet(tmp_path / "in" / "b" / "x.parquet", TEXTS[20:40])
    (tmp_path / "in" / "a.txt").write_text("short text", encoding="utf-8")
    (tmp_path / "in" / "README.md").write_text("no data", encoding="utf-8")
    write_jsonl(tmp_path / "in" / ".hidden" / "d.jsonl", ["hidden"])
    source = opened(tmp_path / "in", tmp_path / "cache")
    assert [shard.name for shard in source.shards("train")] == ["a.txt", "b/x.parquet", "c.jsonl"]
    assert all_texts(source) == sorted([*TEXTS[:40], "short text"])
    by_glob = opened(tmp_path / "in" / "**" / "*.parquet", tmp_path / "cache")
    assert [shard.name for shard in by_glob.shards("val")] == ["x.parquet"]


def test_text_files_are_cut_at_blank_lines_and_lose_no_word(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}, " + "words and words " * (i % 7) + "end." for i in range(100)]
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(paragraphs).encode("utf-8"))
    documents = list(file_formats.documents_of(path, "text", 400))
    assert "\n\n".join(documents) == "\n\n".join(paragraphs)
    assert len(documents) > 10 and max(map(len, documents)) <= 400


def test_text_without_blank_lines_is_cut_too(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("word " * 50_000 + "x" * 30_000, encoding="utf-8")
    documents = list(file_formats.documents_of(path, "text", 1_000))
    assert "".join(documents) == "word " * 50_000 + "x" * 30_000
    assert max(map(len, documents)) <= 1_000


def test_files_are_read_as_utf8_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A regression: files opened in the encoding of the machine."""
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONUTF8", "0")
    (tmp_path / "a.txt").write_bytes("größer als 北京 🙂".encode())
    write_jsonl(tmp_path / "b.jsonl", ["größer als 北京 🙂"])
    assert all_texts(opened(tmp_path, tmp_path / "cache")) == ["größer als 北京 🙂"] * 2


def test_what_is_held_out_does_not_depend_on_the_files(tmp_path: Path) -> None:
    """Validation was the last file on the disk, so it changed with the files that were there."""
    write_jsonl(tmp_path / "1.jsonl", TEXTS[:30])
    write_jsonl(tmp_path / "2.jsonl", TEXTS[30:])
    both = opened(tmp_path, tmp_path / "cache", validation_fraction=0.2)
    first = opened(tmp_path / "1.jsonl", tmp_path / "cache", validation_fraction=0.2)
    held_out = texts_of(first, "val")
    assert 0 < len(held_out) < 30
    of_both = texts_of(both, "val")
    assert held_out == [text for text in of_both if text in TEXTS[:30]]
    (tmp_path / "1.jsonl").rename(tmp_path / "9.jsonl")
    renamed = opened(tmp_path, tmp_path / "cache", validation_fraction=0.2)
    assert sorted(texts_of(renamed, "val")) == sorted(of_both)


def test_one_file_with_two_documents_has_both_splits(tmp_path: Path) -> None:
    """With one file only the train split was empty, and the loader waited for ever."""
    write_jsonl(tmp_path / "a.jsonl", ["one", "", "another"])
    source = opened(tmp_path / "a.jsonl", tmp_path / "cache", validation_fraction=0.001)
    assert len(texts_of(source, "val")) == 1
    assert len([text for text in texts_of(source, "train") if text]) == 1
    assert re.search(r"1 file, .*% of the documents are held out", source.describe())


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_blank_documents_are_empty_and_keep_their_place(tmp_path: Path, suffix: str) -> None:
    texts = ["one", "", " \n\t ", "\u2003", "two", "x"]
    (write_parquet if suffix == ".parquet" else write_jsonl)(tmp_path / f"a{suffix}", texts)
    (tmp_path / "val.txt").write_text("held out\n\n\n", encoding="utf-8")
    source = opened(tmp_path / f"a{suffix}", tmp_path / "cache", validation_path=str(tmp_path / "val.txt"))
    assert texts_of(source, "train") == ["one", "", "", "", "two", "x"]
    assert texts_of(source, "val") == ["held out"]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt"])
def test_an_empty_file_is_no_text(tmp_path: Path, suffix: str) -> None:
    """It is said of the whole data, not of the file: other files may have enough."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(b"") if suffix.endswith("gz") else zstd(b"") if suffix.endswith("zst") else b"")
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    source = opened(path, tmp_path / "cache")
    with pytest.raises(UserError, match=r"too little text[^$]*data\.path="):
        build_token_cache(source, "train", ByteTokenizer(), tmp_path / "cache")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt"])
@pytest.mark.parametrize("unit", ["several words and ", "letters"])
def test_a_document_of_50_mb(tmp_path: Path, suffix: str, unit: str) -> None:
    text = unit * (50_000_000 // len(unit))
    path = tmp_path / f"a{suffix}"
    if suffix == ".txt":
        path.write_text(text, encoding="utf-8")
    else:
        (write_parquet if suffix == ".parquet" else write_jsonl)(path, [text])  # type: ignore[operator]
    tracemalloc.start()
    documents = file_formats.documents_of(path, "text", 8_000)
    if suffix == ".txt":
        assert sum(map(len, documents)) == len(text)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    else:
        assert list(documents) == [text]
    tracemalloc.stop()
    tokenizer = train_tokenizer([unit * 100], TokenizerSettings(vocab_size=270))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_validation_files_of_ones_own(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", TEXTS)
    write_jsonl(tmp_path / "val.jsonl", ["held out"])
    source = opened(tmp_path / "train.jsonl", tmp_path / "cache", validation_path=str(tmp_path / "val.jsonl"))
    assert texts_of(source, "train") == TEXTS
    assert texts_of(source, "val") == ["held out"]
    with pytest.raises(UserError, match=r"val\.jsonl: is under data\.path and under data\.validation_path"):
        opened(tmp_path, tmp_path / "cache", validation_path=str(tmp_path / "val.jsonl"))


def test_a_copy_of_the_training_text_is_nothing_to_validate_on(tmp_path: Path) -> None:
    """Only paths were compared: all that was validated on had been trained on."""
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    write_jsonl(tmp_path / "copy.jsonl", TEXTS)
    with pytest.raises(
        UserError, match=r"copy\.jsonl: is under .*validation_path, with the same contents as .*a\.jsonl"
    ):
        opened(tmp_path / "a.jsonl", tmp_path / "cache", validation_path=str(tmp_path / "copy.jsonl"))
    both = opened(tmp_path / "*.jsonl", tmp_path / "cache").describe()
    assert both.endswith("; copy.jsonl is a copy of a.jsonl: trained on twice")
    for folder in ("train", "val"):  # two empty files share nothing
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "empty.jsonl").write_bytes(b"")
        write_jsonl(tmp_path / folder / "texts.jsonl", [folder])
    source = opened(tmp_path / "train", tmp_path / "cache", validation_path=str(tmp_path / "val"))
    assert texts_of(source, "val") == ["val"]


def test_fingerprints_follow_the_contents_and_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, TEXTS)
    before = opened(path, tmp_path / "cache")
    fingerprint, corpus = before.shards("train")[0].fingerprint, before.fingerprint
    assert fingerprint != before.shards("val")[0].fingerprint
    assert fingerprint == opened(path, tmp_path / "cache").shards("train")[0].fingerprint
    assert fingerprint != opened(path, tmp_path / "cache", validation_fraction=0.2).shards("train")[0].fingerprint
    write_jsonl(path, [*TEXTS[:-1], TEXTS[-1].replace("document", "tnemucod")])
    assert fingerprint != opened(path, tmp_path / "cache").shards("train")[0].fingerprint
    assert corpus != opened(path, tmp_path / "cache").fingerprint
    (tmp_path / "elsewhere").mkdir()
    write_jsonl(tmp_path / "elsewhere" / "b.jsonl", TEXTS)
    assert opened(tmp_path / "elsewhere", tmp_path / "cache").shards("train")[0].fingerprint == fingerprint


def test_a_file_changed_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, TEXTS)
    documents = opened(path, tmp_path / "cache").shards("train")[0].documents()
    next(documents)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "more"}) + "\n")
    with pytest.raises(UserError, match="changed while it was read"):
        list(documents)


def wrong_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Broken files, and what is to be said of each."""
    write_parquet(folder / "column.parquet", TEXTS, column="body")
    write_parquet(folder / "whole.parquet", TEXTS)
    whole = (folder / "whole.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "spoilt.parquet").write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    pq.write_table(pa.table({"text": [1, 2]}), folder / "numbers.parquet")
    not_utf8 = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 2, 4], pa.int32()).buffers()[1], pa.py_buffer(b"ok\xff\xfe")]
    )
    pq.write_table(pa.table({"text": not_utf8}), folder / "bytes.parquet")
    (folder / "latin1.txt").write_bytes(b"x" * 70_000 + "café".encode("latin1") + b" more")
    (folder / "line.jsonl").write_text('{"text": "a"}\n\n{"text": \n', encoding="utf-8")
    (folder / "list.jsonl").write_text('{"text": "a"}\n["b"]\n', encoding="utf-8")
    (folder / "key.jsonl").write_text('{"body": "a", "title": "b"}\n', encoding="utf-8")
    (folder / "number.jsonl").write_text('{"text": 5}\n', encoding="utf-8")
    (folder / "surrogate.jsonl").write_text('{"text": "\\ud800"}\n', encoding="utf-8")
    (folder / "bytes.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    (folder / "cut.jsonl.zst").write_bytes(zstd(b'{"text": "a"}\n' * 100_000)[:-20])
    (folder / "no.jsonl.zst").write_bytes(b'{"text": "a"}\n')
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "no.parquet").write_bytes(b'{"text": "a"}\n')
    (folder / "no.jsonl.gz").write_bytes(b'{"text": "a"}\n')
    (folder / "table.csv").write_text("text\n", encoding="utf-8")
    return {
        "column.parquet": "has no column 'text'; its columns: body, id",
        "cut.parquet": "no whole parquet file",
        "spoilt.parquet": "no whole parquet file",
        "numbers.parquet": "holds int64 and not text",
        "bytes.parquet": "bytes.parquet, row group 0: the 'text' of its row 1 is not UTF-8",
        "latin1.txt": "is not UTF-8: byte 70,003",
        "line.jsonl": "line.jsonl:3: is not valid JSON",
        "list.jsonl": "list.jsonl:2: is not a JSON object",
        "key.jsonl": "key.jsonl:1: has no key 'text'; its keys: body, title",
        "number.jsonl": "number.jsonl:1: 'text' is int",
        "surrogate.jsonl": "surrogate.jsonl:1: .*surrogate",
        "bytes.jsonl": "bytes.jsonl:1: is not valid JSON: .*utf-8",
        "cut.jsonl.gz": "no whole gzip file",
        "no.jsonl.gz": "cannot be read",
        "cut.jsonl.zst": "cannot be read: Truncated",
        "no.jsonl.zst": "cannot be read: ZSTD",
        "empty.parquet": "no whole parquet file",
        "no.parquet": "no whole parquet file",
        "table.csv": "does not end with .parquet or",
    }


def test_every_broken_file_is_named_with_its_fault(tmp_path: Path) -> None:
    """A download that was cut off passed for a shard."""
    for name, message in wrong_files(tmp_path).items():
        with pytest.raises(UserError, match=message) as raised:
            all_texts(opened(tmp_path / name, tmp_path / "cache"))
        assert name in str(raised.value)


@pytest.mark.parametrize("given", ["nothing", "*.txt", "empty", "other"])
def test_a_path_without_files_is_an_error(tmp_path: Path, given: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.csv").write_text("a", encoding="utf-8")
    with pytest.raises(UserError, match=r"data\.path=.*(no such file|it is empty|there are \.csv)"):
        opened(tmp_path / given, tmp_path / "cache")


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.path: is missing"):
        build(DataSettings, {"name": "local"}, "data")
    with pytest.raises(UserError, match=r"data\.path='x': has no meaning for data=python_docs"):
        build(DataSettings, {"path": "x"}, "data")


def texts_in_files(folder: Path, number: int) -> Path:
    folder.mkdir()
    for file in range(number):
        write_jsonl(folder / f"{file:02}.jsonl", [f"{text} of file {file} {'and more ' * 5}" for text in TEXTS])
    return folder


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose documents are read, in the order in which they are opened."""
    opened_files: list[str] = []
    real = local_files.documents_of

    def documents_of(path: Path, *settings: Any) -> Iterator[str]:
        opened_files.append(path.name)
        return real(path, *settings)

    monkeypatch.setattr(local_files, "documents_of", documents_of)
    return opened_files


def test_of_very_much_text_no_more_files_are_held_out_than_the_rows_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terabyte was read and tokenized, to validate on a few million tokens of it."""
    source = opened(texts_in_files(tmp_path / "in", 12), tmp_path / "cache", validation_fraction=0.3)
    source.shards("val")  # the hashes
    reads = counted_reads(monkeypatch)
    whole = build_token_cache(source, "val", ByteTokenizer(), tmp_path / "whole", enough_tokens=2_000)
    assert sorted(set(reads)) == [f"{file:02}.jsonl" for file in range(12)], "of little text all is held out, as ever"
    reads.clear()
    monkeypatch.setattr(sources, "MAX_TEXT_AT_ONCE", 1_000)
    part = build_token_cache(source, "val", ByteTokenizer(), tmp_path / "part", enough_tokens=2_000)
    assert part.num_tokens >= 2_000 and len(part.shards) < 6
    assert set(reads) <= {f"{file:02}.jsonl" for file in range(len(part.shards) + 2)}, "one or two are read ahead"
    assert [shard.lengths().tolist() for shard in part.shards] == [
        shard.lengths().tolist() for shard in whole.shards[: len(part.shards)]
    ]
    everything = build_token_cache(source, "val", ByteTokenizer(), tmp_path / "all", enough_tokens=10**9)
    rows = [
        validation_rows(cache, 32, 0, tmp_path / "rows", 40).read(range(40))[0].tolist()
        for cache in (whole, everything)
    ]
    assert everything.fingerprint == whole.fingerprint and rows[0] == rows[1]
    fewer, again = (
        validation_rows(cache, 32, 0, tmp_path / "rows", 40).read(range(40))[0].tolist()
        for cache in (part, build_token_cache(source, "val", ByteTokenizer(), tmp_path / "2", enough_tokens=2_000))
    )
    assert fewer == again, "and they are the same each time"


def test_files_are_looked_at_once_several_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = texts_in_files(tmp_path / "in", 12)
    hashed, busy, most, lock = [], 0, 0, threading.Lock()

    def slow(path: Path, memo: Path) -> str:
        nonlocal busy, most
        with lock:
            busy, most = busy + 1, max(most, busy + 1)
        time.sleep(0.02)
        with lock:
            busy -= 1
        hashed.append(path.name)
        return path.name

    monkeypatch.setattr(local_files, "file_sha256", slow)
    source = opened(folder, tmp_path / "cache")
    for _ in range(3):
        source.describe()
    assert most > 1
    assert sorted(hashed) == sorted(path.name for path in folder.iterdir())
