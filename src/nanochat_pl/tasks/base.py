"""What a task is: conversations by number, in two parts that share nothing, and a judge of answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any, Literal, TypeVar

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import setting, to_plain
from nanochat_pl.tasks.context import MIXTURE, TaskContext

Split = Literal["train", "test"]
Part = dict[str, str]  # {"type": "text" | "python" | "python_output", "text": …}
Content = str | Sequence[Part]  # of one message
Conversation = dict[str, Any]  # {"messages": [{"role": "user" | "assistant", "content": str | list[Part]}, …]}
T = TypeVar("T")

TEST_ONE_IN = 10  # of the things that a task splits by (operand pairs, words), this fraction is held out
_MAX_HASHED = 20_000
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class TaskSettings:
    """What every task has. A task's own settings are a subclass, in which every key has a default."""

    size: int | None = setting(None, "Training conversations; null: as many as there are different ones.", at_least=1)
    start: int = setting(0, "Training conversations that are passed over, from the first.", at_least=0)
    step: int = setting(1, "Of the training conversations from start on every so many-th: 2 takes half.", at_least=1)
    repeat: int = setting(1, "How often each training conversation occurs in an epoch.", at_least=1)
    test_size: int = setting(200, "Held-out problems, or as many as there are.", at_least=1)
    test_start: int = setting(0, "Held-out problems that are passed over, from the first.", at_least=0)
    test_step: int = setting(1, "Of the held-out problems from test_start on every so many-th.", at_least=1)

    def slice_of(self, split: Split) -> tuple[int, int | None, int]:
        """Start, size (None: no bound) and step of a part."""
        train = split == "train"
        return (self.start, self.size, self.step) if train else (self.test_start, self.test_size, self.test_step)


@dataclass(frozen=True)
class Completion:
    """An answer that a model generated, as a reward sees it.

    Attributes:
        content: its parts, as the chat format parses them.
        ids: its tokens, the stop token and what a tool forced in included.
        finished: whether the model ended it itself, and no limit did.
    """

    content: Content
    ids: Sequence[int] = ()
    finished: bool = True


class Task(ABC):
    """A sequence of conversations. Number i is a pure function of (the task's settings, its split, i).

    The two splits never share an example, and what "the same example" means is the task's to say: the same operands,
    the same word, the same wording.

    Attributes:
        judged: whether answers are right or wrong; of a task that is not, ``evaluate`` cannot be asked.
        kind: how an answer is asked for: written freely, or chosen among :meth:`letters`.
        baseline: the accuracy of guessing, 0 … 1.
        remark: what has to be said with a score, None for most.
        has_training_part: whether it can be trained on.
        can_be_joined: whether its conversations may be turns of a longer one: each begins with the user's message, not
            with the system's, and ends with an answer.
    """

    judged = True
    has_training_part = True
    can_be_joined = True
    kind: Literal["generative", "categorical"] = "generative"
    baseline: float = 0.0
    remark: str | None = None

    def __init__(self, name: str, split: Split, size: int, start: int = 0, step: int = 1) -> None:
        """
        Args:
            name: for people, and the key of its files.
            split: which part.
            size: how many conversations this part has; see :func:`limits`.
            start: number of the first: ``task[0]`` is ``conversation(start)``.
            step: from each to the next: ``task[1]`` is ``conversation(start + step)``.
        """
        self.name = name
        self.split = split
        self._size = size
        self._start = start
        self._step = step

    @classmethod
    def from_settings(cls, settings: Any, split: Split, context: TaskContext) -> Task:
        """Make the task of its settings (of the class that it was registered with).

        Raises:
            UserError: files are missing or wrong.
        """
        return cls(settings, split)  # type: ignore[call-arg]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < self._size:
            raise IndexError(f"{self.name}: conversation {index} of {self._size}")
        return self.conversation(self._start + self._step * index)

    @abstractmethod
    def conversation(self, index: int) -> Conversation:
        """Conversation ``index`` of the task; its last message is the reference answer."""

    @abstractmethod
    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        """Whether an answer to the conversation (its last message being the reference) is right.

        Args:
            conversation: one of this task's.
            answer: the content of the assistant's message: its parts, as the chat format parses them, or text alone.
        """

    def evaluate_all(self, conversations: Sequence[Conversation], answers: Sequence[Content]) -> list[bool]:
        """Judge many answers; for a task that can do it faster than one by one."""
        return [self.evaluate(*pair) for pair in zip(conversations, answers, strict=True)]

    @classmethod
    def gives_reward(cls) -> bool:
        """Whether reinforcement learning can train on such a task.

        Its answers are written freely, and they are judged, or the class has a reward of its own.
        """
        return cls.kind == "generative" and (cls.judged or cls.reward is not Task.reward)

    @property
    def has_reward(self) -> bool:
        """Whether reinforcement learning can train on it: see :meth:`gives_reward`."""
        return self.gives_reward()

    def reward(self, conversation: Conversation, completion: Completion) -> float:
        """What an answer is worth in reinforcement learning: 1 for a right one, else 0."""
        return float(self.evaluate(conversation, completion.content))

    def letters(self, conversation: Conversation) -> Sequence[str]:
        """The possible answers to a conversation of a categorical task."""
        raise TypeError(f"{self.name}: is no categorical task")

    def made_of(self) -> Any:
        """What determines the conversations besides the code, as plain data; None: hash the conversations."""
        return None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the conversations: changes with settings, words, wordings and code, whatever it was.

        Of a task with more than ``_MAX_HASHED``, if it says what it is :meth:`made_of`: over that, and over so
        many of them, drawn once and for all, for what the code makes of them.
        """
        parts = self.made_of() if len(self) > _MAX_HASHED else None
        indices: Sequence[int] = range(len(self))
        digest = hashlib.sha256()
        if parts is not None:
            indices = generator("fingerprint").sample(indices, _MAX_HASHED)
            first = self._start if self._step == 1 else [self._start, self._step]
            digest.update(json.dumps(["made 1", len(self), first, parts], sort_keys=True).encode() + b"\n")
        for index in indices:
            digest.update(json.dumps(self[index], ensure_ascii=True).encode() + b"\n")
        return digest.hexdigest()


def own_settings(settings: TaskSettings, general: type[TaskSettings]) -> dict[str, Any]:
    """The settings that a task has besides those of ``general``, as plain data."""
    shared = {field.name for field in dataclasses.fields(general)}
    return {key: value for key, value in to_plain(settings).items() if key not in shared}


def limits(
    name: str,
    settings: TaskSettings,
    split: Split,
    num_train: int | None = None,
    num_test: int | None = None,
    where: str = MIXTURE,
) -> tuple[int, int, int]:
    """Number of the first conversation of a part, how many it has, and the step from each to the next.

    Args:
        name: the task's, for messages.
        settings: of the task.
        split: which part.
        num_train: how many different training conversations there are; None: any number. A size beyond it goes round
            them again, but for a step above 1.
        num_test: how many different held-out ones; None: any number.
        where: the group that the task is a key of, for messages, as a context has it.

    Raises:
        UserError: all are passed over; or with a step there are fewer than the size says.
    """
    start, size, step = settings.slice_of(split)
    total = num_train if split == "train" else num_test
    if total is None:
        assert size is not None, "a task without end has a size in its settings"
        return start, size, step
    if start >= total:
        key, things = ("start", "training conversations") if split == "train" else ("test_start", "held-out problems")
        raise UserError(f"{where}.{name}.{key}={start}: passes over all {total:,} {things}.")
    available = len(range(start, total, step))
    if size is None or (split == "test" and size > available):
        return start, available, step
    if step > 1 and size > available:
        raise UserError(
            f"{where}.{name}.size={size}: start={start} and step={step} leave {available:,} of {total:,} training"
            " conversations.",
            f"Set size to that or less, and repeat={-(-size // available)} for as many in an epoch.",
        )
    return start, size, step


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


def numbers_of(text: str) -> list[float]:
    """All numbers in a text, in their order; one of more digits than a float holds is infinite."""
    return [float(number) for number in _NUMBER.findall(text)]


def last_number(text: str) -> float | None:
    """The number that a text ends on, as it were: the last one in it. None where there is none."""
    numbers = numbers_of(text)
    return numbers[-1] if numbers else None


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
