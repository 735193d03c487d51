"""Files of conversations: whatever is in them is read or counted by its cause, and found again by number."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.conversations.files import ConversationFile, read_conversations
from nanochat_pl.tokenizer import TokenizerSettings, train_tokenizer
from nanochat_pl.tokenizer.chat_format import problems_of_conversation

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "héllo"}]


def messages(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def read(path: Path, column: str = "messages") -> ConversationFile:
    return read_conversations(path.name, path, column, path.parent / "cache")


def lines_file(folder: Path, *rows: Any, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return path


def table(folder: Path, values: list[Any], column: str = "messages") -> Path:
    path = folder / "a.parquet"
    pq.write_table(pa.table({column: values}), path, row_group_size=3)
    return path


def write(folder: Path, suffix: str, rows: list[list[dict[str, Any]]]) -> Path:
    path = folder / f"a{suffix}"
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".parquet":
        return table(folder, rows)
    if suffix == ".jsonl.zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(text)
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_bytes(gzip.compress(text) if suffix == ".jsonl.gz" else text)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json"])
def test_every_format_gives_the_same_conversations_by_number(suffix: str, tmp_path: Path) -> None:
    rows = [messages(f"q {n}", f"a {n} é\u2028") for n in range(700)]
    file = read(write(tmp_path, suffix, rows))
    assert len(file) == file.audit.rows == 700 and not file.audit.bad
    for index in (699, 0, 350, 1):
        assert file[index] == {"messages": rows[index]}
        assert file.row_number(index) == index + ("jsonl" in suffix)
    assert read(tmp_path / f"a{suffix}").fingerprint == file.fingerprint


def test_rows_come_in_several_forms(tmp_path: Path) -> None:
    path = lines_file(
        tmp_path,
        b"\xef\xbb\xbf" + json.dumps(MESSAGES).encode(),
        {"messages": MESSAGES, "source": "x"},
        b"",
        {"messages": json.dumps(MESSAGES)},
        [{"role": "user", "content": "hi", "id": 3}, {"role": "assistant", "content": "héllo", "weight": 1}],
    )
    file = read(path)
    assert [file[i] for i in range(len(file))] == [{"messages": MESSAGES}] * 4
    assert file.row_number(2) == 4, "a blank line is no row and has a number"
    assert len(set(file.places.tolist())) == 1, "the same conversation has the same place, however it is written"
    assert [dict(m) for m in read(lines_file(tmp_path, MESSAGES, name="b.json"))[0]["messages"]] == MESSAGES
    text_column = read(table(tmp_path, [json.dumps(MESSAGES)], "chat"), "chat")
    assert text_column[0] == {"messages": MESSAGES}


@pytest.mark.parametrize(
    ("row", "cause", "example"),
    [
        (b'[{"role": "us', "invalid JSON", "line 2: is not valid JSON"),
        (b"[" * 100_000, "invalid JSON", "line 2: is not valid JSON"),
        (b'["\xff\xfe"]', "not UTF-8", "line 2: is not UTF-8."),
        (b"3", "no list of messages", "line 2: is int, not a list of messages"),
        (b"null", "no messages", "has no messages"),
        ([], "no messages", "has no messages"),
        ({"text": "hi"}, "no messages", "has no key 'messages'; its keys: text."),
        ({"messages": {"role": "user"}}, "no list of messages", "is dict"),
        (["hi", "there"], "message without role and content", "messages[0]"),
        ([{"role": "narrator", "content": "hi"}], "unknown role", "messages[0].role='narrator'"),
        ([{"role": ["user"], "content": "hi"}], "unknown role", "messages[0].role=['user']"),
        ([*MESSAGES, MESSAGES[1]], "roles that do not take turns", "messages[2].role='assistant': must be 'user'"),
        (MESSAGES[1:], "roles that do not take turns", "messages[0].role='assistant': must be 'user'"),
        ([MESSAGES[0], {"role": "system", "content": "x"}], "roles that do not take turns", "messages[1]"),
        (messages("hi", None), "content that is no text", "messages[1].content=None"),
        (messages("hi", 3), "content that is no text", "messages[1].content=3"),
        (messages([{"type": "image_url"}], "a"), "part that is no text", "messages[0].content[0].type='image_url'"),
        (messages("hi", [{"type": "image", "text": ""}]), "unknown part", "messages[1].content[0].type='image'"),
        (messages("hi", [{"type": "python", "text": None}]), "content that is no text", ".content[0].text=None"),
        (messages(" \n", "a"), "empty content", "messages[0].content: is empty."),
        (messages("hi", ""), "empty content", "messages[1].content: is empty."),
        (messages("hi", []), "empty content", "messages[1].content: is empty."),
        (messages("hi"), "no answer", "none of the assistant's"),
        ([{"role": "system", "content": "x"}], "no user message", "no user message"),
        (b'[{"role":"user","content":"\\ud800"},{"role":"assistant","content":"a"}]', "no Unicode text", "surrogate"),
    ],
)
def test_a_bad_row_is_counted_by_its_cause_and_named(row: Any, cause: str, example: str, tmp_path: Path) -> None:
    file = read(lines_file(tmp_path, MESSAGES, row, MESSAGES))
    assert file.audit.bad == {cause: 1} and file.audit.rows == 3
    assert example in file.audit.examples[cause][0] and len(file.audit.examples[cause][0]) <= 201
    assert len(file) == 2 and file[1]["messages"] == MESSAGES


def test_only_the_first_few_are_named(tmp_path: Path) -> None:
    file = read(lines_file(tmp_path, *[b"x"] * 50, MESSAGES))
    assert file.audit.bad == {"invalid JSON": 50} and len(file.audit.examples["invalid JSON"]) == 3


def test_what_teaches_nothing_is_left_off_and_counted(tmp_path: Path) -> None:
    system = [{"role": "system", "content": ""}, *MESSAGES]
    file = read(lines_file(tmp_path, [*MESSAGES, {"role": "user", "content": "bye"}], system, system[:1] + MESSAGES))
    assert [file[i]["messages"] for i in range(3)] == [MESSAGES] * 3
    assert not file.audit.bad and sorted(file.audit.changed.values()) == [1, 2]
    kept = [{"role": "system", "content": "Be kind."}, *MESSAGES]
    assert read(lines_file(tmp_path, kept, name="b.jsonl"))[0]["messages"] == kept


def test_a_table_may_hold_nulls_and_text_that_is_none(tmp_path: Path) -> None:
    file = read(table(tmp_path, [MESSAGES, None, [], MESSAGES]))
    assert file.audit.bad == {"no messages": 2} and "row 1" in file.audit.examples["no messages"][0]
    assert file.row_number(1) == 3
    offsets, data = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")
    pq.write_table(pa.table({"messages": pa.StringArray.from_buffers(2, offsets, data)}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet").audit.bad == {"invalid JSON": 1, "not UTF-8": 1}


def test_what_is_no_such_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column 'messages'; its columns: text"):
        read(table(tmp_path, ["a"], "text"))
    (tmp_path / "b.parquet").write_bytes(b"this is no table")
    with pytest.raises(UserError, match=r"b\.parquet: is no whole parquet file"):
        read(tmp_path / "b.parquet")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b"[]\n" * 5000)[:40])
    with pytest.raises(UserError, match=r"c\.jsonl\.gz: is no whole gzip file"):
        read(tmp_path / "c.jsonl.gz")
    (tmp_path / "d.jsonl").write_bytes(b"")
    assert read(tmp_path / "d.jsonl").audit.rows == 0
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "missing.jsonl")


def test_junk_is_not_read_to_its_end(tmp_path: Path) -> None:
    """50 MB: as lines it is given up after some thousands of them, as one line it is one bad row."""
    junk = os.urandom(2**20).replace(b"\n", b"") * 50
    lines = lines_file(tmp_path, b"\n".join(junk[i : i + 1000] for i in range(0, len(junk), 1000)))
    with pytest.raises(UserError, match="of its first 10,000 rows none is a conversation") as error:
        read(lines)
    assert "line 1: is not UTF-8" in str(error.value)
    assert not list((tmp_path / "cache").rglob("manifest.json")), "nothing half-read is kept"
    assert read(lines_file(tmp_path, junk, name="b.jsonl")).audit.bad == {"not UTF-8": 1}


def test_a_changed_file_is_read_anew_and_a_damaged_cache_made_again(tmp_path: Path) -> None:
    path = lines_file(tmp_path, MESSAGES)
    first = read(path)
    (first.folder / "rows.jsonl").write_bytes(b"x" * 71)
    assert read(path)[0]["messages"] == MESSAGES
    changed = read(lines_file(tmp_path, messages("a", "b")))
    assert changed.fingerprint != first.fingerprint and changed[0]["messages"] == messages("a", "b")


@pytest.mark.parametrize(
    "name",
    [
        "hub/datasets/OpenAssistant/oasst-en100-messages/default/train-00000-of-00001.parquet",
        "hub/datasets/alexa/topical-chat-messages/default/test-00000-of-00001.parquet",
        "hub/datasets/google-research-datasets/schema-guided-dialogue-messages/default/test-00000-of-00001.parquet",
        "hub/datasets/mosaicml/dolly_hhrlhf-small-messages/default/train-00000-of-00001.parquet",
        "custom_json/fastchat_dummy_conversation.jsonl",
    ],
)
def test_real_rows_render_and_come_back(name: str, shared: Path, tmp_path: Path) -> None:
    """Every row of the real sets: read, rendered, decoded, and its answers parsed again."""
    tokenizer = train_tokenizer(
        ["the cat and the other that was there before it had come. " * 50], TokenizerSettings(280)
    )
    path = shared / "data" / name
    file = read_conversations(path.name, path, "messages", tmp_path / "cache")
    assert not file.audit.bad and not file.audit.changed
    start, end = (tokenizer.special_ids[f"<|assistant_{mark}|>"] for mark in ("start", "end"))
    for index in range(len(file)):
        conversation = file[index]
        assert not problems_of_conversation(conversation)
        ids, mask = tokenizer.render_conversation(conversation, max_tokens=10**9)
        assert len(ids) == len(mask) and any(mask)
        answers = [m["content"] for m in conversation["messages"] if m["role"] == "assistant"]
        starts = [i for i, token in enumerate(ids) if token == start]
        parsed = [tokenizer.parse_assistant(ids[i + 1 :]) for i in starts]
        assert parsed == [[{"type": "text", "text": answer}] for answer in answers]
        assert tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if m and t != end]) == "".join(answers)
