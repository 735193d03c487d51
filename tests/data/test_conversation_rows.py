"""Nothing of a row is lost without a word: it is used, or named as not read, or the row is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_pl.data.conversations.files import read_conversations
from nanochat_pl.data.conversations.validate import Judged, judge
from nanochat_pl.tokenizer.chat_format import Fault

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PLAIN = [USER, ANSWER]
SYSTEM = {"role": "system", "content": "S"}


def judged(row: Any) -> Judged:
    found = judge(row, "messages")
    assert isinstance(found, Judged), found
    return found


def call(code: str, number: str | None = None, **others: Any) -> dict[str, Any]:
    return {"id": number, "function": {"name": "python", "arguments": json.dumps({"code": code, **others})}}


@pytest.mark.parametrize(
    "row",
    [
        {"system": "S", "messages": PLAIN},
        {"system": "S", "messages": json.dumps(PLAIN)},
        {"system": "S", "conversations": json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])},
        {"system": {"text": "S"}, "messages": PLAIN},
        {"system": {"role": "user", "parts": [{"text": "S"}]}, "messages": PLAIN},
        {"system": "S", "messages": [SYSTEM, *PLAIN]},
        {"system_prompt": "S", "instruction": "q", "output": "a"},
    ],
)
def test_a_system_prompt_beside_the_messages_is_used(row: Any) -> None:
    found = judged(row)
    assert json.loads(found.line)["messages"][0] in ({"role": "user", "content": "S\n\nq"}, SYSTEM)
    assert (found.changes, found.unread) == ([], set())


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"system": "A", "messages": [SYSTEM, *PLAIN]}, {"system"}),
        ({"system": "S", "system_prompt": "B", "messages": PLAIN}, {"system_prompt"}),
        ({"system": {"mood": "calm", "content": "S"}, "messages": PLAIN}, {"messages[].mood"}),
        ({"prompt": "other", "chosen": PLAIN}, {"prompt"}),
        ({"prompt": "q", "chosen": PLAIN}, set()),
        ({"prompt": [USER], "chosen": PLAIN}, set()),
        ({"input": {"messages": [USER], "tools": [1]}, "preferred_output": [ANSWER]}, {"input.tools"}),
        ({"instruction": [{"type": "text", "text": "q"}], "input": "more", "output": "a"}, {"input"}),
        ([{**USER, "speaker": "Ann"}, ANSWER], {"messages[].speaker"}),
        ([{**USER, "from": "human"}, ANSWER], set()),
        (
            [USER, {"role": "assistant", "tool_calls": [call("1", timeout=3)]}, {"role": "tool", "content": "1"}],
            {"messages[].tool_calls[].timeout"},
        ),
    ],
)
def test_what_is_not_used_is_named(row: Any, unread: set[str]) -> None:
    assert judged(row).unread == unread


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ([{"role": "user", "from": "gpt", "content": "q"}, ANSWER], "two roles"),
        ({"instruction": "q", "input": {"a": 1}, "output": "a"}, "content that is no text"),
        ({"instruction": "q", "input": ["x"], "output": "a"}, "content that is no text"),
        ({"instruction": "q", "input": False, "output": "a"}, "content that is no text"),
        (
            [USER, {**ANSWER, "function_call": call("1")["function"], "tool_calls": [call("2")]}],
            "tool calls",
        ),
        (
            [
                USER,
                {"role": "assistant", "tool_calls": [call("1", "x"), call("2", "y")]},
                {"role": "tool", "tool_call_id": "y", "content": "2"},
                {"role": "tool", "tool_call_id": "x", "content": "1"},
            ],
            "tool calls",
        ),
        ({"messages": [[("role", "user"), ("content", "q"), ("content", "r")], ANSWER]}, "a key twice"),
    ],
)
def test_what_contradicts_itself_is_refused(row: Any, cause: str) -> None:
    found = judge(row, "messages")
    assert isinstance(found, Fault) and found.cause == cause


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.timestamp("us"), 10**18),
        (pa.timestamp("us"), -(10**17)),
        (pa.timestamp("us", tz="Nope/Zone"), 5),
        (pa.date32(), 10**7),
        (pa.duration("s"), 10**15),
    ],
)
@pytest.mark.parametrize("place", ["message", "column"])
def test_a_time_that_python_cannot_hold_spoils_nothing(kind: Any, value: int, place: str, tmp_path: Path) -> None:
    """The file was unreadable, with a traceback, also where nobody asks for the time."""
    times = pa.array([value], pa.int32() if kind == pa.date32() else pa.int64()).cast(kind)
    roles, contents = (pa.array([message[key] for message in PLAIN]) for key in ("role", "content"))
    fields = {"role": roles, "content": contents}
    if place == "message":
        fields["created"] = pa.concat_arrays([times, times])
    messages = pa.ListArray.from_arrays([0, 2], pa.StructArray.from_arrays(list(fields.values()), list(fields)))
    columns = {"messages": messages} | ({"context": times} if place == "column" else {})
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    file = read_conversations("a", path, "messages", tmp_path / "cache")
    assert file[0] == {"messages": PLAIN}
    assert file.audit.unread == ({"messages[].created": 1} if place == "message" else {"context": 1})


@pytest.mark.parametrize("value", [{"messages": PLAIN}, PLAIN, [PLAIN], [{"messages": PLAIN}]])
def test_a_json_file_may_be_one_row_or_a_list_of_rows(value: Any, tmp_path: Path) -> None:
    """One row over several lines was judged line by line: as many rows of no JSON."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
    file = read_conversations("a", path, "messages", tmp_path / "cache")
    assert file[0] == {"messages": PLAIN} and (file.audit.rows, file.audit.bad) == (1, {})


def test_rows_in_a_list_in_a_line_are_said_to_be_that() -> None:
    for rows in ([{"messages": PLAIN}], [{"prompt": "q", "completion": "a"}]):
        found = judge(rows, "messages")
        assert isinstance(found, Fault) and found.cause == "a list of rows"
