"""What a task is: conversations by number, in two parts that share nothing, and a judge of answers."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from random import Random
from typing import Any, Literal, TypeVar

Split = Literal["train", "test"]
Part = dict[str, str]  # {"type": "text" | "python" | "python_output", "text": …}
Content = str | Sequence[Part]  # of one message
Conversation = dict[str, Any]  # {"messages": [{"role": "user" | "assistant", "content": str | list[Part]}, …]}
T = TypeVar("T")

TEST_ONE_IN = 10  # of the things that a task splits by (operand pairs, words), this fraction is held out
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class Task(ABC):
    """A sequence of conversations. Number i is a pure function of (the task's settings, its split, i).

    The two splits never share an example, and what "the same example" means is the task's to say: the same operands,
    the same word, the same wording.

    Attributes:
        judged: whether answers are right or wrong; of a task that is not, ``evaluate`` cannot be asked.
    """

    judged = True

    def __init__(self, name: str, split: Split, size: int) -> None:
        self.name = name
        self.split = split
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < self._size:
            raise IndexError(f"{self.name}: conversation {index} of {self._size}")
        return self.conversation(index)

    @abstractmethod
    def conversation(self, index: int) -> Conversation:
        """Conversation ``index``, 0 <= index < len(self); its last message is the reference answer."""

    @abstractmethod
    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        """Whether an answer to the conversation (its last message being the reference) is right.

        Args:
            conversation: one of this task's.
            answer: the content of the assistant's message: its parts, as the chat format parses them, or text alone.
        """

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all conversations: changes with settings, words, wordings and code, whatever it was."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(json.dumps(self[index], ensure_ascii=True).encode() + b"\n")
        return digest.hexdigest()


def conversation_of(question: str, answer: str | list[Part]) -> Conversation:
    """A conversation of one question and its reference answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def tool_answer(code: str, output: str, text: str) -> list[Part]:
    """An answer that calls the tool first: the call, what it gave, and the words after it."""
    return [
        {"type": "python", "text": code},
        {"type": "python_output", "text": output},
        {"type": "text", "text": text},
    ]


def reference_of(conversation: Conversation) -> Content:
    """The reference answer."""
    return conversation["messages"][-1]["content"]


def text_of(answer: Content) -> str:
    """What an answer says to the user: its parts without tool calls and their output."""
    if isinstance(answer, str):
        return answer
    return "".join(part["text"] for part in answer if part["type"] == "text")


def last_number(text: str) -> float | None:
    """The number that a text ends on, as it were: the last one in it. None where there is none."""
    numbers = _NUMBER.findall(text)
    return float(numbers[-1]) if numbers else None


def same_last_number(conversation: Conversation, answer: Content) -> bool:
    """Whether an answer's words end on the number on which those of the reference do."""
    expected = last_number(text_of(reference_of(conversation)))
    assert expected is not None, "a reference answer without a number"
    return last_number(text_of(answer)) == expected


def generator(*key: object) -> Random:
    """A generator of its own for each key (a task's name, split, index).

    The key is hashed as text: neighbouring numbers and numbers of opposite sign give unrelated generators, which
    ``Random(1)`` and ``Random(-1)`` do not.
    """
    return Random("/".join(map(str, key)))


def is_held_out(*key: object) -> bool:
    """Whether a thing belongs to the test part: one in ``TEST_ONE_IN`` does, by a hash of the thing itself."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % TEST_ONE_IN == 0


def part_of(things: Sequence[T], split: Split, *kind: object) -> list[T]:
    """Those of the things that belong to a split, in their order."""
    return [thing for thing in things if is_held_out(*kind, thing) == (split == "test")]
