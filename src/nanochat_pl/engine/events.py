"""What a reader sees of the tokens of an answer: text in whole characters, tool calls, tool results."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from nanochat_pl.tokenizer import Tokenizer

EventKind = Literal["text", "tool_call", "tool_result", "finished"]

# The special tokens around a part. Others have no meaning within an answer and are passed over.
_OPENS: dict[str, EventKind] = {"<|python_start|>": "tool_call", "<|output_start|>": "tool_result"}
_CLOSES: dict[str, EventKind] = {"<|python_end|>": "tool_call", "<|output_end|>": "tool_result"}
# By the names that events and messages have for them.
_CALLS, _RESULTS = ("tool_call", "python"), ("tool_result", "python_output")


class Readable:
    """The parts of an answer as one text for a reader, piece by piece: a call with its result as ``[2*21 = 42] ``."""

    def __init__(self) -> None:
        self._is_open = False

    def add(self, kind: str, text: str) -> str:
        """What a part adds.

        Args:
            kind: of an event, or the type of a part of a message.
            text: what is in it.
        """
        closing = "] " if self._is_open else ""  # of a call that has no result
        had_call, self._is_open = self._is_open, kind in _CALLS
        if kind in _CALLS:
            return f"{closing}[{text}"
        if kind in _RESULTS:
            return f" = {text}] " if had_call else f"[= {text}] "
        return closing + text

    def end(self) -> str:
        """What is missing at the end."""
        return "]" if self._is_open else ""


def readable(parts: Iterable[tuple[str, str]]) -> str:
    """All parts of an answer, each with its kind, as one text for a reader."""
    reader = Readable()
    return "".join([*(reader.add(kind, text) for kind, text in parts), reader.end()])


@dataclass(frozen=True)
class Event:
    """A piece of an answer.

    Attributes:
        kind: "text" pieces come as soon as their characters are whole; "tool_call" (the expression) and
            "tool_result" come once, when they are complete; "finished" comes last.
        text: the piece; of "finished" the reason: "stop", "length", "context", "cancelled" or "error".
    """

    kind: EventKind
    text: str


class EventReader:
    """Turns token ids into events.

    Text is decoded from the tokens' bytes by an incremental UTF-8 decoder: a character whose bytes are spread over
    several tokens comes out when its last byte is there, and bytes that are no UTF-8 come out as U+FFFD. Special
    tokens are never shown. All events together say what ``Tokenizer.parse_assistant`` says of the whole answer.

    Args:
        tokenizer: of the ids.
        stop_texts: the text ends before the first of these in it. What may become one is held back.

    Attributes:
        ended: whether :meth:`end` was called.
    """

    def __init__(self, tokenizer: Tokenizer, stop_texts: Sequence[str] = ()) -> None:
        self._tokens = tokenizer.tokens
        self._names = {special_id: name for name, special_id in tokenizer.special_ids.items()}
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._part: EventKind = "text"
        self._collected = ""
        self._stops = stop_texts
        self._held = ""  # text that may be the beginning of a stop text
        self._cut = False
        self.ended = False

    def read(self, ids: Iterable[int]) -> list[Event]:
        """The events that these tokens complete: text, and the ends of parts."""
        events: list[Event] = []
        plain: list[bytes] = []  # tokens that follow each other
        for token_id in ids:
            if (name := self._names.get(token_id)) is None:
                plain.append(self._tokens[token_id])
            elif name in _OPENS or (name in _CLOSES and _CLOSES[name] == self._part):
                events += self._read_plain(plain) + self._end_part()
                self._part, plain = _OPENS.get(name, "text"), []
        return events + self._read_plain(plain)

    def _read_plain(self, tokens: list[bytes]) -> list[Event]:
        return self._emit(self._decoder.decode(b"".join(tokens)))

    def end(self) -> list[Event]:
        """What is still held back: the bytes of an unfinished character (as U+FFFD), an unfinished tool call."""
        self.ended = True
        return self._end_part()

    def _end_part(self) -> list[Event]:
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        if self._part == "text":
            return self._emit(rest, last=True)
        event = Event(self._part, self._collected + rest)
        self._part, self._collected = "text", ""
        return [event]

    def _emit(self, text: str, last: bool = False) -> list[Event]:
        if self._part != "text":
            self._collected += text
            return []
        if self._stops:
            text = self._before_stop(text, last)
        return [Event("text", text)] if text else []

    def _before_stop(self, text: str, last: bool) -> str:
        """What of the text so far can be shown now."""
        if self._cut:
            return ""
        text = self._held + text
        if found := [place for stop in self._stops if (place := text.find(stop)) >= 0]:
            self._cut, self._held = True, ""
            return text[: min(found)]
        longest = 0 if last else max(_overlap(text, stop) for stop in self._stops)
        shown = len(text) - longest
        self._held = text[shown:]
        return text[:shown]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text with which a stop text begins."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)


def visible_text(tokenizer: Tokenizer, ids: Iterable[int], stop_texts: Sequence[str] = ()) -> str:
    """The text of an answer without special tokens, tool calls and tool results: what :class:`EventReader` shows."""
    reader = EventReader(tokenizer, stop_texts)
    events = reader.read(ids) + reader.end()
    return "".join(event.text for event in events if event.kind == "text")
