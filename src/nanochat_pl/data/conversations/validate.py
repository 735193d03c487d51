"""What counts as a conversation in an untrusted file: one row in, a plain conversation out, or the cause of its fault.

A row is a list of messages, or an object with such a list under a key, or either of them as JSON text, or in one of the
formats of :mod:`~nanochat_pl.data.conversations.formats`. What is kept of a message is its role, its content, and that
it is not to be learnt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nanochat_pl.data.conversations.formats import parse_json, read_row
from nanochat_pl.tokenizer.chat_format import Fault, faults_of_conversation, text_of_part

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
        forms: how many were in the format of another program, by its name.
        unread: in how many there was a key that nothing is made of, by the key.
    """

    rows: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    forms: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)

    @property
    def num_bad(self) -> int:
        return sum(self.bad.values())

    def count_bad(self, fault: Fault, place: str) -> None:
        self.bad[fault.cause] = self.bad.get(fault.cause, 0) + 1
        examples = self.examples.setdefault(fault.cause, [])
        if len(examples) < MAX_EXAMPLES:
            line = f"{place}: {fault.problem}"
            examples.append(line if len(line) <= _LONGEST_EXAMPLE else f"{line[:_LONGEST_EXAMPLE]}…")

    def count_good(self, judged: Judged) -> None:
        """Note what became of a row that is taken."""
        _count(self.changed, set(judged.changes))
        _count(self.forms, [judged.form] if judged.form else [])
        _count(self.unread, judged.unread)

    def add(self, other: Audit, prefix: str = "") -> None:
        """Add what was found elsewhere; ``prefix`` goes in front of its places."""
        self.rows += other.rows
        for kind in ("bad", "changed", "forms", "unread"):
            for name, count in getattr(other, kind).items():
                _count(getattr(self, kind), [name], count)
        for cause, lines in other.examples.items():
            examples = self.examples.setdefault(cause, [])
            examples.extend(f"{prefix}{line}" for line in lines[: MAX_EXAMPLES - len(examples)])


class Judged(NamedTuple):
    """A conversation as a line of JSON (``{"messages": …}``), and what was done to make it so."""

    line: bytes
    changes: list[str]
    form: str
    unread: set[str]


def _count(counts: dict[str, int], names: Iterable[str], by: int = 1) -> None:
    for name in names:
        counts[name] = counts.get(name, 0) + by


def parse_line(line: bytes) -> Any | Fault:
    """A line of JSON as plain data."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return NOT_UTF8
    return parse_json(text)


def judge(row: Any, column: str) -> Judged | Fault:
    """A row as a conversation, or the first fault of it.

    A last message of the user's, which nothing answers, teaches nothing and is left off; so is an empty last answer
    with its question, and an empty system message.

    Args:
        column: the key of the messages where the row is an object.
    """
    reading = row if isinstance(row, Fault) else read_row(row, column)
    if isinstance(reading, Fault):
        return reading
    messages, changes = list(reading.messages), list(reading.changes)
    if messages and _is_blank_system(messages[0]):
        messages = messages[1:]
        changes.append("empty system message left off")
    if faults := faults_of_conversation({"messages": messages}):
        return faults[0]
    if messages[-1]["role"] == "user":
        messages.pop()
        changes.append("last message of the user, which nothing answers, left off")
    elif len(messages) > 3 and messages[-3]["role"] == "assistant" and _is_empty(messages[-1]["content"]):
        messages = messages[:-2]
        changes.append("empty last answer left off, with its question")
    for i, message in enumerate(messages):
        if _is_empty(message["content"]):
            return Fault("empty content", f"messages[{i}].content: is empty.")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        return Fault("no answer", "messages: there is none of the assistant's.")
    if not any(message.get("weight", 1) for message in answers):
        return Fault("marked not to be learnt", "messages: all of the assistant's are marked not to be learnt.")
    if len(answers) > sum(message.get("weight", 1) for message in answers):
        changes.append("answers that are marked not to be learnt are shown and not learnt")
    text = json.dumps({"messages": list(map(_plain, messages))}, ensure_ascii=False, separators=(",", ":"))
    try:
        return Judged(text.encode("utf-8") + b"\n", changes, reading.form, reading.unread)
    except UnicodeEncodeError:
        return Fault("no Unicode text", "holds half of a surrogate pair, which is no character.")


def _is_blank_system(message: Any) -> bool:
    if not isinstance(message, Mapping) or message.get("role") != "system":
        return False
    content = message.get("content")
    return content is None or (isinstance(content, str) and not content.strip())


def _is_empty(content: Any) -> bool:
    texts = [content] if isinstance(content, str) else [text_of_part(part) for part in content]
    return not any(text.strip() for text in texts)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if not isinstance(content, str):
        content = [{"type": part["type"], "text": text_of_part(part)} for part in content]
    return {"role": message["role"], "content": content} | ({"weight": 0} if message.get("weight") == 0 else {})
