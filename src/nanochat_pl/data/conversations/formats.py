"""The chat formats of other programs: which one a row is in, and the row as messages of ours.

Read are: OpenAI's messages (parts, roles, calls of ``python``), ShareGPT, Alpaca, prompt and completion under their
usual names, preference pairs (the chosen answer), Gemini's contents. Others are named. Marks that say what is not to be
learnt become ``weight`` 0, or the row is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from reprlib import repr as quote  # shortens
from typing import Any

from nanochat_pl.data.conversations.calls import (
    CALLS,
    NO_TOOLS,
    TOOL_PARTS,
    TOOL_ROLES,
    Call,
    calls_of,
    fault_of_answer,
)
from nanochat_pl.data.conversations.marks import LEARN, LEARN_NOT, MARKS, PIECES, marked_part, marked_row, weight_of
from nanochat_pl.data.files.read import json_fault, strict_json
from nanochat_pl.tokenizer.chat_format import Fault, text_of_part

MESSAGES = "messages"  # the key that a person need not name
# Other names of the list of messages, and the format that has it.
_LISTS = {
    "conversations": "ShareGPT",
    "conversation": "a list under 'conversation'",
    "dialogue": "a list under 'dialogue'",
    "dialog": "a list under 'dialog'",
    "chat": "a list under 'chat'",
    "contents": "Gemini's contents",
}
# Question and answer under two keys. Of instructions a third one holds what they are about.
_PAIRS = {
    ("instruction", "output"): "Alpaca",
    ("instruction", "response"): "Dolly (instruction and response)",
    ("prompt", "completion"): "prompt and completion",
    ("prompt", "response"): "prompt and response",
    ("question", "answer"): "question and answer",
    ("question", "response"): "question and response",
    ("query", "response"): "query and response",
    ("problem", "solution"): "problem and solution",
    ("input", "output"): "input and output",
}
_ABOUT = ("input", "context")
_SYSTEM = ("system", "system_prompt", "system_message", "systemInstruction")
_PREFERENCE, _OPENAI_PREFERENCE = ("chosen", "rejected"), ("preferred_output", "non_preferred_output")
_KEYS = (
    *(MESSAGES, *_LISTS, *_SYSTEM, *_PREFERENCE, *_OPENAI_PREFERENCE, *MARKS, *_ABOUT, "history", "tools"),
    *(key for pair in _PAIRS for key in pair),
)
_ROLE_KEYS = ("role", "from", "speaker")
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_THINKING_PARTS = ("thinking", "reasoning", "redacted_thinking")
# What else a message may have of its contents: there is no place for it here.
_CONTENTS = ("reasoning_content", "reasoning", "thinking", "thought", "refusal", "audio", "images", "annotations")


@dataclass
class Reading:
    """A row as messages, and what was done to make it so.

    Attributes:
        messages: of the assistant's those that are not to be learnt have ``weight`` 0.
        form: the format's name; "" where it is the usual one.
        changes: what was left off.
        unread: keys that were not looked at, ``messages[].KEY`` those of messages.
    """

    messages: list[Any]
    form: str = ""
    changes: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)


def keys_to_read(column: str, names: Iterable[str]) -> list[str] | None:
    """The columns of a table that its rows are read from; None where no format is recognised by them."""
    names = list(names)
    if column in names or (column == MESSAGES and _form_of(dict.fromkeys(names, True)) is not None):
        return [name for name in names if name == column or name in _KEYS]
    return None


def hint_of(keys: Iterable[str]) -> str:
    """What a row with these keys is, where that is known and it is not read; with a blank in front."""
    there = set(keys)
    for wanted, what in (
        ({"chosen", "rejected"}, "Pairs of transcripts in one text each (as Anthropic's HH) are not read."),
        ({"mapping"}, "ChatGPT's export is a tree of messages, which is not read."),
        ({"message_id", "parent_id"}, "OpenAssistant's messages, one a row, have to be joined by parent_id first."),
        ({"text"}, "A text is no conversation; data=local trains on texts."),
        ({"data"}, "UltraChat's lists of texts are not read; rows under 'data' have to be a list without a name."),
    ):
        if wanted <= there:
            return f" {what}"
    return ""


def read_row(row: Any, column: str) -> Reading | Fault:
    """A row of any of the formats as messages.

    Args:
        row: plain data: a list of messages, or an object.
        column: the key that holds the messages; where it is the usual one, other formats are recognised by their keys.
    """
    form, values = "", row
    unread: set[str] = set()
    changes: list[str] = []
    if isinstance(row, Mapping):
        if (fault := marked_row(row)) is not None:
            return fault
        found = ("", column) if column in row else _form_of(row) if column == MESSAGES else None
        if found is None:
            keys = ", ".join(map(str, row)) or "none"
            return Fault("no messages", f"has no key {column!r}; its keys: {keys}.{hint_of(map(str, row))}")
        form, key = found
        read = _values_of(row, key)
        if isinstance(read, Fault):
            return read
        values, used, changes = read
        if _holds(row, "tools"):
            used.add("tools")
            changes.append("descriptions of tools left out")
    if isinstance(values, str):
        values = parse_json(values)
        if isinstance(values, Fault):
            return values
    if isinstance(row, Mapping):
        values = _with_system(values, row, used)
        unread = {str(name) for name in row if _holds(row, name) and name not in used}
        wrapped = [key for key in used if isinstance(row.get(key), Mapping) and MESSAGES in row[key]]
        unread |= {
            f"{key}.{name}" for key in wrapped for name in row[key] if name != MESSAGES and _holds(row[key], name)
        }
    if values is None or values == []:
        return Fault("no messages", "has no messages.")
    if not isinstance(values, list):
        return Fault("no list of messages", f"is {type(values).__name__}, not a list of messages.")
    if isinstance(first := values[0], Mapping) and _role_of(first) is None and (MESSAGES in first or _form_of(first)):
        return Fault("a list of rows", "is a list of rows: each has to be a line of its own, or all a .json file.")
    return _read_messages(values, Reading([], form, changes, unread))


def parse_json(text: str) -> Any | Fault:
    """JSON text as plain data."""
    try:
        return strict_json(text)
    except (ValueError, RecursionError) as error:
        return Fault("invalid JSON", f"{json_fault(error)}.")


def _holds(row: Mapping[str, Any], key: str) -> bool:
    return row.get(key) not in (None, "", [], {})


def _form_of(row: Mapping[str, Any]) -> tuple[str, str | tuple[str, ...]] | None:
    """The name of a format and its key or keys; None where none is recognised."""
    for key, name in _LISTS.items():
        if _holds(row, key) and not (isinstance(row[key], str) and not row[key].lstrip().startswith("[")):
            return name, key
    if _holds(row, "preferred_output") and _holds(row, "input"):
        return "OpenAI's preference pairs", ("input", *_OPENAI_PREFERENCE)
    if _holds(row, "chosen") and (_holds(row, "prompt") or not isinstance(row["chosen"], str)):
        return "preference pairs", ("prompt", *_PREFERENCE)
    for pair, name in _PAIRS.items():
        if all(key in row for key in pair):
            return name, pair
    return None


def _values_of(row: Mapping[str, Any], key: str | tuple[str, ...]) -> tuple[Any, set[str], list[str]] | Fault:
    """The messages of a row, the keys that were used for them, and what was left out."""
    used = {key} if isinstance(key, str) else {*key}
    used |= {mark for mark in MARKS if row.get(mark) == (mark not in LEARN_NOT)}  # they say: to be learnt
    changes: list[str] = []
    if isinstance(key, str):
        values = row[key]
    elif key[1] in (*_PREFERENCE, *_OPENAI_PREFERENCE):
        question, chosen, rejected = key
        values, has_question = _preferred(row.get(question), row[chosen])
        if not has_question:
            used.discard(question)
        if _holds(row, rejected):
            changes.append(f"{rejected} answer left out")
    else:
        question, answer = key
        asked = row[question]
        about = {name: row[name] for name in _ABOUT if question == "instruction" and _holds(row, name)}
        if isinstance(asked, str):
            for name, text in about.items():
                if not isinstance(text, str):
                    return Fault("content that is no text", f"{name}={quote(text)}: is {type(text).__name__}, no text.")
            asked = "\n\n".join([asked, *about.values()])
            used |= about.keys()
        values = [*_as_messages(asked, "user"), *_as_messages(row[answer], "assistant")]
        if isinstance(history := row.get("history"), list) and history:
            used.add("history")
            pairs = [pair for pair in history if isinstance(pair, list) and len(pair) == 2]
            changes += ["history that is no list of pairs left out"] if len(pairs) < len(history) else []
            earlier = [{"role": ("user", "assistant")[i], "content": pair[i]} for pair in pairs for i in (0, 1)]
            values = [*earlier, *values]
    return values, used, changes


def _with_system(values: Any, row: Mapping[str, Any], used: set[str]) -> Any:
    """The messages with the system prompt of the row, unless they have one of their own; what it was is ``used``."""
    name = next((name for name in _SYSTEM if _holds(row, name)), None)
    if name is None or not isinstance(values, list) or not values:
        return values
    system = row[name]
    first = _as_mapping(values[0])
    if isinstance(first, Mapping) and _role_of(first) == "system":
        used |= {name} if system in first.values() else set()
        return values
    used.add(name)
    message = system if isinstance(system, Mapping) else {"content": system}  # Gemini's has parts
    return [{**{key: value for key, value in message.items() if key not in _ROLE_KEYS}, "role": "system"}, *values]


def _as_messages(value: Any, role: str) -> list[Any]:
    """A text as a message; a list of messages as it is."""
    if isinstance(value, Mapping) and MESSAGES in value:
        value = value[MESSAGES]
    if isinstance(value, list) and all(isinstance(each, Mapping) and not each.get("type") for each in value):
        return value
    return [{"role": role, "content": value}]


def _preferred(question: Any, chosen: Any) -> tuple[list[Any], bool]:
    """The question, unless the chosen messages begin with one, and the chosen answer; whether the question is there."""
    answer = _as_messages(chosen, "assistant")
    whole = bool(answer) and isinstance(answer[0], Mapping) and _role_of(answer[0]) in ("user", "system")
    asked = [] if question is None else _as_messages(question, "user")
    if not whole:
        return [*asked, *answer], True
    return answer, {*map(_content_of, asked)} <= {*map(_content_of, answer)}


def _content_of(message: Any) -> str:
    return str(message.get(_content_key(message)) if isinstance(message, Mapping) else message)


def _role_of(message: Mapping[str, Any]) -> Any:
    role = next((message[key] for key in _ROLE_KEYS if _holds(message, key)), None)
    return _ROLES.get(role.strip().lower(), role) if isinstance(role, str) else role


def _read_messages(values: list[Any], reading: Reading) -> Reading | Fault:
    pending: list[Call] = []  # of the last message, which no tool has answered yet
    merging = False  # whether the next of the assistant's goes on with the last
    for i, value in enumerate(values):
        where = f"messages[{i}]"
        message = _as_mapping(value)
        if isinstance(message, Fault):
            return message
        if not isinstance(message, Mapping):
            reading.messages.append(value)
            continue
        role = _role_of(message)
        if isinstance(role, str) and role.strip().lower() in TOOL_ROLES:
            if (fault := fault_of_answer(message, role, pending, where)) is not None:
                return fault
            reading.messages[-1]["content"].append({"type": "python_output", "text": message.get("content")})
            pending = pending[1:]
            continue
        if pending:
            break
        read = _read_message(message, role, where, reading)
        if isinstance(read, Fault):
            return read
        content, weight, pending = read
        plain = {"role": role, "content": content} | ({"weight": 0} if weight == 0 else {})
        if merging and role == "assistant":
            before = reading.messages[-1]
            if before.get("weight", 1) != weight:
                return Fault("tool calls", f"{where}: goes on with an answer that is marked otherwise.")
            before["content"] += content if isinstance(content, list) else [{"type": "text", "text": content}]
        else:
            reading.messages.append(plain)
        merging = bool(pending)
    if pending:
        return Fault("tool calls", "messages: a call of python is not answered.")
    return reading


def _as_mapping(message: Any) -> Any:
    """Tables may hold messages as maps, which are read as lists of pairs; a Fault where a key is in one twice."""
    is_map = isinstance(message, list) and message and all(isinstance(each, tuple) for each in message)
    if is_map and len(dict(message)) < len(message):
        return Fault("a key twice", f"a map has a key twice: {quote([key for key, _ in message])}.")
    return dict(message) if is_map else message


def _read_message(
    message: Mapping[str, Any], role: Any, where: str, reading: Reading
) -> tuple[Any, int, list[Call]] | Fault:
    """The content of a message, its weight, and the calls of python that it ends with."""
    key = _content_key(message)
    content = message.get(key)
    weight = weight_of(message, where) if role == "assistant" else 1
    if isinstance(weight, Fault):
        return weight
    roles = {name: _role_of({name: message[name]}) for name in _ROLE_KEYS if _holds(message, name)}
    if len({*_ROLES.values()}.intersection(map(str, roles.values()))) > 1:
        return Fault("two roles", f"{where}: {', '.join(f'{name}={quote(message[name])}' for name in roles)}.")
    known = {key, *(name for name in roles if roles[name] == role)}
    known |= {*LEARN, *LEARN_NOT, *CALLS, *_CONTENTS, *PIECES}
    there = [name for name in message if _holds(message, name)]
    reading.unread |= {f"messages[].{name}" for name in there if name not in known}
    reading.changes += [f"{name} of a message left out" for name in there if name in _CONTENTS]
    if isinstance(content, list):
        content = _read_parts(content, role, where, reading)
    calls = calls_of(message, where)
    if isinstance(content, Fault):
        return content
    if isinstance(calls, Fault):
        return calls
    if content is None and not calls and (left := [name for name in there if name in _CONTENTS]):
        return Fault("content that is no text", f"{where}.{key}: is null; {', '.join(left)} of a message is not read.")
    if calls:
        texts = content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
        content = [*texts, *({"type": "python", "text": call.code} for call in calls)]
        reading.unread |= {f"messages[].tool_calls[].{name}" for call in calls for name in call.others}
    return content, weight, calls


def _content_key(message: Mapping[str, Any]) -> str:
    return next((name for name in ("content", "value", "parts", "text") if name in message), "content")


def _read_parts(parts: list[Any], role: Any, where: str, reading: Reading) -> Any:
    """The parts of a message: of the assistant's as they are, of others' their text, a line for each."""
    kept: list[Any] = []
    for number, part in enumerate(parts):
        part = {"type": "text", "text": part} if isinstance(part, str) else _as_mapping(part)
        if isinstance(part, Fault):
            return part
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in TOOL_PARTS:
            return Fault("tool calls", f"{where}.content[{number}].type={kind!r}: {NO_TOOLS}.")
        if kind in _THINKING_PARTS:
            reading.changes.append(f"{kind} of a message left out")
            continue
        if isinstance(part, Mapping):
            if role == "assistant" and (fault := marked_part(part, f"{where}.content[{number}]")) is not None:
                return fault
            _note_keys_of_part(part, reading)
            is_text = kind in ("input_text", "output_text") or (kind is None and "text" in part)
            part = {"type": "text" if is_text else kind, "text": text_of_part(part)}
        kept.append(part)
    if role == "assistant":
        return kept
    for number, part in enumerate(kept):
        if not isinstance(part, Mapping) or part["type"] != "text":
            kind = part["type"] if isinstance(part, Mapping) else part
            return Fault("part that is no text", f"{where}.content[{number}].type={quote(kind)}: only text is read.")
    texts = [part["text"] for part in kept]
    return "\n".join(texts) if all(isinstance(text, str) for text in texts) else texts


def _note_keys_of_part(part: Mapping[str, Any], reading: Reading) -> None:
    """Note the keys of a part that nothing is made of; the text is that of :func:`text_of_part`."""
    known = {"type", "text" if "text" in part else "code", *LEARN, *LEARN_NOT, *PIECES, *_CONTENTS}
    there = [name for name in part if _holds(part, name)]
    reading.unread |= {f"messages[].content[].{name}" for name in there if name not in known}
    reading.changes += [f"{name} of a message left out" for name in there if name in _CONTENTS]
