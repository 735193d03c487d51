"""Conversations: how messages become token ids with a training mask, and generated ids become parts again.

A conversation is plain data::

    {"messages": [{"role": "user", "content": "2*21?"},
                  {"role": "assistant", "content": [{"type": "python", "text": "2*21"},
                                                    {"type": "python_output", "text": "42"},
                                                    {"type": "text", "text": "It is 42."}]}]}

Roles alternate, beginning with the user; a system message may come first. Keys other than these are left alone, but for
``weight`` 0 of a message of the assistant's, of which nothing is learnt; a part may have its text under ``code``.
Trained on (mask 1) is what the assistant has to produce: its text, its tool calls with both markers, and its end.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from reprlib import repr as quote  # shortens
from typing import TYPE_CHECKING, Any, NamedTuple

from nanochat_pl.common.errors import UserError

if TYPE_CHECKING:
    from nanochat_pl.tokenizer.bpe import Tokenizer

Conversation = Mapping[str, Any]
Part = dict[str, str]

# The tokens around a part of an assistant's message, by the part's type. A text has none.
_MARKERS: dict[str, tuple[str, str]] = {
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}
_PART_TYPES = ("text", *_MARKERS)
ROLES = ("system", "user", "assistant")


class _Segment(NamedTuple):
    """A special token, or a text to encode, with its mask."""

    text: str
    special: bool
    mask: int


class Fault(NamedTuple):
    """Something that is wrong with a conversation."""

    cause: str  # its kind, by which such conversations are counted
    problem: str  # a line that names the place and the value


def problems_of_conversation(conversation: Any) -> list[str]:
    """What is wrong with a conversation, one line each; empty if nothing is."""
    return [fault.problem for fault in faults_of_conversation(conversation)]


def faults_of_conversation(conversation: Any) -> list[Fault]:
    """What is wrong with a conversation, each with its cause; empty if nothing is."""
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, (list, tuple)):
        return [Fault("no list of messages", "messages: must be a list.")]
    faults = []
    turns = 0
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            faults.append(Fault("message without role and content", f"{where}: must have a role and a content."))
            continue
        role, content = message.get("role"), message.get("content")
        if i == 0 and role == "system":
            expected = "system"
        else:
            expected = ("user", "assistant")[turns % 2]
            turns += 1
        if role != expected:
            cause = "roles that do not take turns" if role in ROLES else "unknown role"
            line = f"{where}.role={quote(role)}: must be {expected!r} here (user and assistant take turns)."
            faults.append(Fault(cause, line))
        if message.get("weight") not in (None, 0, 1):
            line = f"{where}.weight={quote(message['weight'])}: must be 0 or 1."
            faults.append(Fault("weight that is neither 0 nor 1", line))
        if expected == "assistant" and isinstance(content, (list, tuple)):
            faults.extend(_faults_of_parts(content, f"{where}.content"))
        elif not isinstance(content, str):
            allowed = "text or a list of parts" if expected == "assistant" else "text"
            faults.append(Fault("content that is no text", f"{where}.content={quote(content)}: must be {allowed}."))
    if turns == 0 and not faults:
        faults.append(Fault("no user message", "messages: there is no user message."))
    return faults


def _faults_of_parts(parts: Sequence[Any], where: str) -> list[Fault]:
    faults = []
    for i, part in enumerate(parts):
        kind, text = (part.get("type"), text_of_part(part)) if isinstance(part, Mapping) else (None, None)
        if kind not in _PART_TYPES:
            line = f"{where}[{i}].type={quote(kind)}: must be one of {', '.join(_PART_TYPES)}."
            faults.append(Fault("unknown part", line))
        elif not isinstance(text, str):
            faults.append(Fault("content that is no text", f"{where}[{i}].text={quote(text)}: must be text."))
    return faults


def _segments(conversation: Conversation) -> list[_Segment]:
    """A conversation as special tokens and texts. Raises UserError with all problems."""
    if problems := problems_of_conversation(conversation):
        raise UserError(problems)
    segments = [_Segment("<|bos|>", True, 0)]
    system = ""
    for message in conversation["messages"]:
        if message["role"] == "system":
            system = message["content"] + "\n\n"
        elif message["role"] == "user":
            segments.append(_Segment("<|user_start|>", True, 0))
            segments.append(_Segment(system + message["content"], False, 0))
            segments.append(_Segment("<|user_end|>", True, 0))
            system = ""
        else:
            segments.append(_Segment("<|assistant_start|>", True, 0))
            learnt = int(message.get("weight") != 0)
            segments.extend(_assistant_segments(message["content"], learnt))
            segments.append(_Segment("<|assistant_end|>", True, learnt))
    return segments


def text_of_part(part: Mapping[str, Any]) -> Any:
    """What a part of a message holds: under ``text``, else under ``code``."""
    return part.get("text", part.get("code"))


def _assistant_segments(content: str | Sequence[Mapping[str, str]], learnt: int) -> list[_Segment]:
    if isinstance(content, str):
        return [_Segment(content, False, learnt)]
    segments = []
    for part in content:
        # What a tool answers is forced into the stream, so nothing of it is learnt.
        mask = learnt if part["type"] != "python_output" else 0
        text = _Segment(text_of_part(part), False, mask)
        if part["type"] in _MARKERS:
            start, end = _MARKERS[part["type"]]
            segments += [_Segment(start, True, mask), text, _Segment(end, True, mask)]
        else:
            segments.append(text)
    return segments


def render_conversation(
    tokenizer: Tokenizer, conversation: Conversation, max_tokens: int = 2048
) -> tuple[list[int], list[int]]:
    """Ids and mask (1: trained on, 0: not) of a conversation, cut at ``max_tokens``.

    Source: recipe.md, section 2; golden/conversations.json.

    Raises:
        UserError: the conversation is not as described above; the lines name each place.
    """
    ids: list[int] = []
    mask: list[int] = []
    for text, special, trained in _segments(conversation):
        piece = [tokenizer.special_ids[text]] if special else tokenizer.encode(text)
        ids += piece
        mask += [trained] * len(piece)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(tokenizer: Tokenizer, conversation: Conversation, max_tokens: int | None = None) -> list[int]:
    """The ids after which the assistant's next message begins; they end with ``<|assistant_start|>``.

    A last message of the assistant is the answer that is asked for, and left out.

    Args:
        max_tokens: length of the result at most, 1 or more; what is too much is cut before ``<|assistant_start|>``.

    Raises:
        UserError: as for :func:`render_conversation`.
    """
    if problems := problems_of_conversation(conversation):
        raise UserError(problems)
    messages = list(conversation["messages"])
    if messages[-1]["role"] == "assistant":
        messages.pop()
    max_before = sys.maxsize if max_tokens is None else max_tokens - 1
    ids, _ = render_conversation(tokenizer, {"messages": messages}, max_before)
    return [*ids, tokenizer.special_ids["<|assistant_start|>"]]


def parse_assistant(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Part]:
    """What an assistant generated, as the parts of a message: type text, python or python_output, and the text.

    The inverse of rendering: reads from after ``<|assistant_start|>`` to ``<|assistant_end|>`` or the end. A part that
    was not closed, because generation stopped, is kept; a special token without meaning here is passed over.
    """
    opens = {tokenizer.special_ids[start]: kind for kind, (start, _) in _MARKERS.items()}
    closes = {tokenizer.special_ids[end]: kind for kind, (_, end) in _MARKERS.items()}
    parts: list[Part] = []
    kind = "text"
    pending: list[int] = []

    def finish() -> None:
        if pending or kind != "text":
            parts.append({"type": kind, "text": tokenizer.decode(pending)})

    for token in ids:
        if token < tokenizer.bos_id:
            pending.append(token)
        elif token == tokenizer.special_ids["<|assistant_end|>"]:
            break
        elif token in opens or closes.get(token) == kind:
            finish()
            kind, pending = opens.get(token, "text"), []
    finish()
    return parts
