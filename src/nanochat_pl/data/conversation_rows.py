"""What counts as a conversation in a stranger's file: one row in, a plain conversation out, or the cause of its fault.

A row is a list of messages, or an object with such a list under a key, or either of them as JSON text. What is kept of
a message is its role and its content.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nanochat_pl.tokenizer.chat_format import Fault, faults_of_conversation

NOT_UTF8 = Fault("not UTF-8", "is not UTF-8.")
MAX_EXAMPLES = 3  # places that are named of each cause
_LONGEST_EXAMPLE = 200  # characters


@dataclass
class Audit:
    """What was found in the rows of some files.

    Attributes:
        rows: all of them; blank lines are none.
        bad: how many were left out, by cause.
        examples: the first few of each cause: place and problem.
        changed: how many were taken with a change, by what was done.
    """

    rows: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)

    @property
    def num_bad(self) -> int:
        """Rows that were left out."""
        return sum(self.bad.values())

    def count_bad(self, fault: Fault, place: str) -> None:
        """Note a row that is left out."""
        self.bad[fault.cause] = self.bad.get(fault.cause, 0) + 1
        examples = self.examples.setdefault(fault.cause, [])
        if len(examples) < MAX_EXAMPLES:
            line = f"{place}: {fault.problem}"
            examples.append(line if len(line) <= _LONGEST_EXAMPLE else f"{line[:_LONGEST_EXAMPLE]}…")

    def count_changes(self, changes: list[str]) -> None:
        """Note what was changed in a row."""
        for change in changes:
            self.changed[change] = self.changed.get(change, 0) + 1

    def add(self, other: Audit, prefix: str = "") -> None:
        """Add what was found elsewhere; ``prefix`` goes in front of its places."""
        self.rows += other.rows
        for mine, theirs in ((self.bad, other.bad), (self.changed, other.changed)):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count
        for cause, lines in other.examples.items():
            examples = self.examples.setdefault(cause, [])
            examples.extend(f"{prefix}{line}" for line in lines[: MAX_EXAMPLES - len(examples)])


def parse_line(line: bytes) -> Any | Fault:
    """A line of JSON as plain data."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return NOT_UTF8
    return parse_json(text)


def parse_json(text: str) -> Any | Fault:
    """JSON text as plain data."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Fault("no JSON", f"is no JSON: {error}")


def judge(row: Any, column: str) -> tuple[bytes, list[str]] | Fault:
    """A row as a line of JSON (``{"messages": …}``) with what was changed in it, or the first fault of it.

    A last message of the user's, which nothing answers, teaches nothing and is left off; so is an empty system message.

    Args:
        row: plain data.
        column: the key of the messages where the row is an object.
    """
    messages = _messages_of(row, column)
    if isinstance(messages, Fault):
        return messages
    messages, changes = list(messages), []
    if messages and _is_blank_system(messages[0]):
        messages, changes = messages[1:], ["empty system message left off"]
    if faults := faults_of_conversation({"messages": messages}):
        return faults[0]
    if messages[-1]["role"] == "user":
        messages.pop()
        changes.append("last message of the user, which nothing answers, left off")
    for i, message in enumerate(messages):
        if _is_empty(message["content"]):
            return Fault("empty content", f"messages[{i}].content: is empty.")
    if not any(message["role"] == "assistant" for message in messages):
        return Fault("no answer", "messages: there is none of the assistant's.")
    text = json.dumps({"messages": list(map(_plain, messages))}, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode("utf-8") + b"\n", changes
    except UnicodeEncodeError:
        return Fault("no Unicode text", "holds half of a surrogate pair, which is no character.")


def _messages_of(row: Any, column: str) -> list[Any] | Fault:
    if isinstance(row, Fault):
        return row
    if isinstance(row, Mapping):
        if column not in row:
            return Fault("no messages", f"has no key {column!r}; its keys: {', '.join(map(str, row)) or 'none'}.")
        row = row[column]
    if isinstance(row, str):
        row = parse_json(row)
    if isinstance(row, Fault) or (isinstance(row, list) and row):
        return row
    if row is None or row == []:
        return Fault("no messages", "has no messages.")
    return Fault("no list of messages", f"is {type(row).__name__}, not a list of messages.")


def _is_blank_system(message: Any) -> bool:
    if not isinstance(message, Mapping) or message.get("role") != "system":
        return False
    content = message.get("content")
    return content is None or (isinstance(content, str) and not content.strip())


def _is_empty(content: Any) -> bool:
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    return not any(text.strip() for text in texts)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if not isinstance(content, str):
        content = [{"type": part["type"], "text": part["text"]} for part in content]
    return {"role": message["role"], "content": content}
