"""Kinds of faults in files of conversations: what is dropped without a word, marks not to learn, formats of others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.cache.conversations import build_conversation_cache
from nanochat_pl.data.conversations.files import ConversationFile, read_conversations
from nanochat_pl.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
USER, ANSWER = {"role": "user", "content": "hi?"}, {"role": "assistant", "content": "yes."}
PLAIN = [USER, ANSWER]


def read(path: Path, tmp_path: Path, column: str = "messages") -> ConversationFile:
    return read_conversations(path.name, path, column, tmp_path / "cache")


def of_rows(tmp_path: Path, *rows: Any, column: str = "messages") -> ConversationFile:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read(path, tmp_path, column)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the answer is that there is one. " * 50], TokenizerSettings(280))


def learnt(tokenizer: Tokenizer, conversation: Any) -> str:
    ids, mask = tokenizer.render_conversation(conversation, max_tokens=10**9)
    return tokenizer.decode([token for token, trained in zip(ids, mask, strict=True) if trained])


@pytest.mark.parametrize("name", ["openai_weight0", "axolotl_train_false"])
def test_01_what_is_marked_is_shown_and_not_learnt(
    name: str, shared: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    file = read(shared / f"cases/01_openai_weight0/{name}.jsonl", tmp_path)
    assert len(file) == 20 and list(file.audit.changed.values()) == [20]
    for index in range(20):
        text = learnt(tokenizer, file[index])
        assert "WRONG" not in text and re.search(r"Item \d+ is green", text)
        assert "WRONG" in json.dumps(file[index]), "what follows can only be learnt after it"


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0.0}, {"weight": False}, {"loss": False}, {"training": False}, {"masked": True}, {"loss_weight": 0}],
)
def test_marks_under_other_names(mark: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = of_rows(tmp_path, [USER, {**ANSWER, "content": "wrong", **mark}, USER, ANSWER], [USER, {**ANSWER, **mark}])
    assert len(file) == 1 and file.audit.bad == {"marked not to be learnt": 1}
    assert learnt(tokenizer, file[0]) == "yes.<|assistant_end|>"


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ([USER, {**ANSWER, "weight": 0.5}], "weight that is neither 0 nor 1"),
        ([USER, {**ANSWER, "train": "no"}], "weight that is neither 0 nor 1"),
        ([USER, {**ANSWER, "train_detail": [{"begin": 0, "end": 2, "train": False}]}], "marks of pieces of a message"),
        ({"messages": PLAIN, "train": False}, "marked not to be learnt"),
        ({"messages": PLAIN, "weight": 0}, "marked not to be learnt"),
        ({"messages": PLAIN, "weight": 0.5}, "weight that is neither 0 nor 1"),
        ({"prompt": "a", "completion": "b", "weight": 0.5}, "weight that is neither 0 nor 1"),
        ({"prompt": "a", "completion": "b", "training": 0}, "marked not to be learnt"),
        ({"prompt": "a", "completion": "b", "masked": True}, "marked not to be learnt"),
        ({"prompt": "a", "completion": "b", "loss_mask": [1, 0]}, "marks of pieces of a message"),
        ({"prompt": "a", "completion": "b", "label": False}, "marked not to be learnt"),
    ],
)
def test_marks_that_cannot_be_honoured_refuse_the_row(row: Any, cause: str, tmp_path: Path) -> None:
    file = of_rows(tmp_path, PLAIN, row)
    assert file.audit.bad == {cause: 1} and len(file) == 1
    if isinstance(row, dict):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "t.parquet")
        assert read(tmp_path / "t.parquet", tmp_path).audit.bad == {cause: 1}, "marks in columns of a table, too"


def of_part(**keys: Any) -> list[Any]:
    parts = [{"type": "text", "text": "no."} | keys, {"type": "text", "text": "yes."}]
    return [USER, {"role": "assistant", "content": parts}]


@pytest.mark.parametrize(
    ("mark", "cause"),
    [
        ({"weight": 0}, "marks of pieces of a message"),
        ({"train": False}, "marks of pieces of a message"),
        ({"masked": True}, "marks of pieces of a message"),
        ({"loss_mask": [0, 1]}, "marks of pieces of a message"),
        ({"weight": 0.5}, "weight that is neither 0 nor 1"),
    ],
)
def test_marks_of_parts_refuse_the_row(mark: dict[str, Any], cause: str, tmp_path: Path) -> None:
    file = of_rows(tmp_path, PLAIN, of_part(**mark), {"prompt": "a", "completion": of_part(**mark)[1]["content"]})
    assert file.audit.bad == {cause: 2} and len(file) == 1
    assert f"messages[1].content[0].{next(iter(mark))}" in file.audit.examples[cause][0]


def test_keys_of_parts_that_change_nothing_of_what_is_learnt(tmp_path: Path) -> None:
    asked = {"role": "user", "content": [{"type": "text", "text": "hi?", "weight": 0, "cache_control": {"type": "x"}}]}
    answer = {"role": "assistant", "content": [{"type": "python_output", "text": "2", "weight": 0, "annotations": [1]}]}
    file = of_rows(tmp_path, of_part(weight=1, masked=False, foo=3), [asked, answer])
    assert len(file) == 2
    assert file.audit.unread == {"messages[].content[].foo": 1, "messages[].content[].cache_control": 1}
    assert file.audit.changed == {"annotations of a message left out": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b", "history": 3},
        {"instruction": "a", "output": "b", "history": [3, ["x"]]},
        [USER, {"role": "assistant", "content": 3, "tool_calls": 5}],
        [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "python"}}]}],
        {"conversations": "a text"},
        {"conversations": [3, None]},
        {"contents": {"parts": 1}},
        {"chosen": [], "rejected": [], "prompt": {}},
        {"input": 1, "preferred_output": 2},
    ],
)
def test_odd_rows_are_bad_rows_or_good_ones(row: Any, tmp_path: Path) -> None:
    audit = of_rows(tmp_path, row).audit
    assert audit.rows == 1 and audit.num_bad in (0, 1)


def test_an_answer_that_is_a_refusal_alone(tmp_path: Path) -> None:
    file = of_rows(tmp_path, PLAIN, [USER, {"role": "assistant", "content": None, "refusal": "No."}])
    (example,) = file.audit.examples["content that is no text"]
    assert "messages[1].content: is null; refusal of a message is not read" in example


def test_an_answer_of_null_behind_a_call(tmp_path: Path) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [call("python", {"code": "1"})]}
    file = of_rows(tmp_path, [USER, called, {"role": "tool", "content": "1"}, {"role": "assistant", "content": None}])
    assert file.audit.bad == {"content that is no text": 1}


def test_marks_of_rows_that_mean_something_else(tmp_path: Path) -> None:
    file = of_rows(tmp_path, {"messages": PLAIN, "label": False}, {"messages": PLAIN, "weight": 72.5, "train": "x"})
    assert len(file) == 2 and file.audit.unread == {"label": 1, "weight": 1, "train": 1}


def test_where_all_is_learnt_a_marked_conversation_is_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = of_rows(tmp_path, [USER, {**ANSWER, "weight": 0}, USER, ANSWER], PLAIN)
    cache = build_conversation_cache(file, tokenizer, 100, tmp_path / "c", "x", loss_mask="all")
    assert (cache.rendering.num_marked, cache.rendering.num_without_target) == (1, 1)


@pytest.mark.parametrize("name", ["tool_calls_text", "tool_calls_null"])
def test_02_calls_of_unknown_tools_refuse_the_row(name: str, shared: Path, tmp_path: Path) -> None:
    file = read(shared / f"cases/02_tool_calls_dropped/{name}.jsonl", tmp_path)
    assert len(file) == 0 and file.audit.bad == {"tool calls": 20}
    assert "messages[1].tool_calls: calls 'lookup'; only calls of python" in file.audit.examples["tool calls"][0]


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_calls_of_python_become_parts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    calls = {"role": "assistant", "content": "Let me see.", "tool_calls": [call("python", '{"code": "6*7"}')]}
    tool, answer = (
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    )
    file = of_rows(tmp_path, [USER, calls, tool, answer], [USER, {**calls, "content": None}, tool, answer])
    parts = [("text", "Let me see."), ("python", "6*7"), ("python_output", "42"), ("text", "It is 42.")]
    assert [(part["type"], part["text"]) for part in file[0]["messages"][1]["content"]] == parts
    assert [part["text"] for part in file[1]["messages"][1]["content"]] == ["6*7", "42", "It is 42."]
    text = learnt(tokenizer, file[0])
    assert "<|python_start|>6*7<|python_end|>It is 42.<|assistant_end|>" in text and "<|output" not in text


@pytest.mark.parametrize(
    "messages",
    [
        [USER, {**ANSWER, "function_call": {"name": "f", "arguments": "{}"}}],
        [USER, {**ANSWER, "tool_calls": [call("python", "{")]}],
        [USER, {**ANSWER, "tool_calls": [call("python", '{"code": "1"}')]}],
        [USER, ANSWER, {"role": "tool", "content": "x"}, ANSWER],
        [USER, {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {}}]}],
        [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}],
    ],
)
def test_other_calls_refuse_the_row(messages: Any, tmp_path: Path) -> None:
    assert of_rows(tmp_path, messages).audit.bad == {"tool calls": 1}


@pytest.mark.parametrize(("name", "key"), [("reasoning", "reasoning_content"), ("thinking_field", "thinking")])
def test_04_reasoning_that_is_left_out_is_said(name: str, key: str, shared: Path, tmp_path: Path) -> None:
    file = read(shared / f"cases/04_reasoning_dropped/{name}.jsonl", tmp_path)
    assert len(file) == 20 and file.audit.changed == {f"{key} of a message left out": 20}


def test_every_key_that_is_not_read_is_counted(tmp_path: Path) -> None:
    thinks = {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yes."}],
    }
    rows: list[Any] = [{"messages": [USER, {**ANSWER, "id": 3}], "source": "web", "score": None}, [USER, thinks]]
    rows.append({"messages": PLAIN, "tools": [{"name": "f"}]})
    file = of_rows(tmp_path, *rows)
    assert file.audit.unread == {"source": 1, "messages[].id": 1}
    assert file.audit.changed == {"thinking of a message left out": 1, "descriptions of tools left out": 1}
    table = pa.table({"messages": [PLAIN] * 3, "source": ["a", None, "b"], "prompt_id": [1, 2, 3]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet", tmp_path).audit.unread == {"source": 3, "prompt_id": 3}


ITEM = re.compile(r"^Item \d+ is green with \d+ dots\.$")


@pytest.mark.parametrize(
    ("name", "form", "rows"),
    [
        ("cased_roles", None, 6),
        ("chosen", "preference pairs", None),
        ("developer", None, 6),
        ("empty_last_answer", None, 6),
        ("prompt_completion", "prompt and completion", 6),
        ("sharegpt", "ShareGPT", 6),
        ("user_parts", None, 6),
    ],
)
def test_27_common_formats_are_read(name: str, form: str | None, rows: int, shared: Path, tmp_path: Path) -> None:
    file = read(shared / f"cases/27_formats_without_a_hint/{name}.jsonl", tmp_path)
    assert not file.audit.bad and len(file) == file.audit.rows >= 4
    assert list(file.audit.forms) == ([form] if form else [])
    for index in range(len(file)):
        *_, asked, answer = file[index]["messages"]
        assert asked["role"] == "user" and asked["content"].startswith("What is the colour")
        text = answer["content"] if isinstance(answer["content"], str) else answer["content"][0]["text"]
        assert ITEM.fullmatch(text)
    if name == "empty_last_answer":
        assert file.audit.changed == {"empty last answer left off, with its question": 6}
    if name == "developer":
        assert file[0]["messages"][0] == {"role": "system", "content": "Be brief."}


TURNS = [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "a", "input": "", "output": "b"}, TURNS),
        ({"instruction": "a", "input": "x", "output": "b"}, [("user", "a\n\nx"), ("assistant", "b")]),
        ({"instruction": "a", "context": "x", "response": "b"}, [("user", "a\n\nx"), ("assistant", "b")]),
        ({"instruction": "a", "output": "b", "history": [["p", "q"]]}, [("user", "p"), ("assistant", "q"), *TURNS]),
        ({"system_prompt": "s", "question": "a", "response": "b"}, [("system", "s"), *TURNS]),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
            [("system", "s"), *TURNS],
        ),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}, TURNS),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, TURNS),
        ({"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": []}, TURNS),
        (
            {
                "input": {"messages": [{"role": "user", "content": "a"}]},
                "preferred_output": [{"role": "assistant", "content": "b"}],
                "non_preferred_output": [],
            },
            TURNS,
        ),
        (
            {"contents": [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": [{"text": "b"}]}]},
            TURNS,
        ),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}, {"role": "assistant", "content": "b"}],
            TURNS,
        ),
    ],
)
def test_other_formats_are_read(row: Any, expected: list[tuple[str, str]], tmp_path: Path) -> None:
    file = of_rows(tmp_path, row)
    assert not file.audit.bad, file.audit.examples

    def text(content: Any) -> str:
        return content if isinstance(content, str) else "".join(part["text"] for part in content)

    assert [(message["role"], text(message["content"])) for message in file[0]["messages"]] == expected
    if isinstance(row, dict):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "t.parquet")
        assert read(tmp_path / "t.parquet", tmp_path)[0] == file[0], "a table of the same columns is read alike"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "### Human: a\n### Assistant: b"}, "A text is no conversation"),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}, "Pairs of transcripts"),
        ({"message_id": "1", "parent_id": None, "role": "prompter"}, "OpenAssistant"),
        ({"mapping": {}, "title": "x"}, "ChatGPT's export"),
    ],
)
def test_formats_that_are_not_read_are_named(row: Any, said: str, tmp_path: Path) -> None:
    file = of_rows(tmp_path, row)
    assert said in file.audit.examples["no messages"][0]


def test_28_prompts_longer_than_a_row(shared: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = read(shared / "cases/28_prompts_longer_than_a_row/longprompt.jsonl", tmp_path)
    with pytest.raises(
        UserError, match=r"^mine: none of 30 .*: every prompt is longer than a row of 128 tokens"
    ) as error:
        build_conversation_cache(file, tokenizer, 129, tmp_path / "c", "key", name="mine")
    assert "model.sequence_len" in error.value.fix


def test_parts_of_code_and_duplicate_keys(tmp_path: Path, tokenizer: Tokenizer) -> None:
    parts = [{"type": "python", "code": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "2."}]
    conversation = {"messages": [USER, {"role": "assistant", "content": parts}]}
    assert "<|python_start|>1+1<|python_end|>2." in learnt(tokenizer, conversation)
    assert of_rows(tmp_path, conversation)[0]["messages"][1]["content"][0] == {"type": "python", "text": "1+1"}
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"messages": [], "messages": []}\n', encoding="utf-8")
    assert "'messages' stands twice" in read(twice, tmp_path).audit.examples["invalid JSON"][0]


def test_text_in_columns_of_other_types(tmp_path: Path) -> None:
    for kind in (pa.string_view(), pa.large_string(), pa.binary()):
        messages = pa.list_(pa.struct([("role", kind), ("content", kind)]))
        rows = [
            [{key: value.encode() if kind == pa.binary() else value for key, value in each.items()} for each in PLAIN]
        ]
        pq.write_table(pa.table({"messages": pa.array(rows, messages)}), tmp_path / "t.parquet")
        assert read(tmp_path / "t.parquet", tmp_path)[0]["messages"] == PLAIN
    of_map = pa.list_(pa.map_(pa.string(), pa.string()))
    pq.write_table(
        pa.table({"messages": pa.array([[list(each.items()) for each in PLAIN]], of_map)}), tmp_path / "m.parquet"
    )
    assert read(tmp_path / "m.parquet", tmp_path)[0]["messages"] == PLAIN
    columns = [pa.array([PLAIN]), pa.array([PLAIN])]
    pq.write_table(pa.Table.from_arrays(columns, names=["messages", "messages"]), tmp_path / "d.parquet")
    with pytest.raises(UserError, match="has the column 'messages' twice"):
        read(tmp_path / "d.parquet", tmp_path)


def test_the_examples_of_the_page_are_read(tmp_path: Path) -> None:
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    lines = block.strip().splitlines()
    file = of_rows(tmp_path, *map(json.loads, lines))
    assert len(lines) >= 7 and not file.audit.bad and len(file) == len(lines)
