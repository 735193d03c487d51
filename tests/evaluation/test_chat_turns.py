"""The benchmark of chats of several turns: who asks what, and that each answer is judged in its own turn."""

from __future__ import annotations

import importlib
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from nanochat_pl.engine import Engine
from nanochat_pl.tasks.base import Task, conversation_of, text_of
from tests.helpers.small_engine import scripted_bundle


class Echo(Task):
    """Right is what was asked for."""

    def __init__(self) -> None:
        super().__init__("echo", "test", 3)

    def conversation(self, index):
        return conversation_of(f"say {index}", str(index))

    def evaluate(self, conversation, answer):
        return text_of(answer) == conversation["messages"][-1]["content"]


@pytest.fixture
def chat_turns(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("chat_turns")


def test_subjects_change_and_no_problem_comes_twice(chat_turns: ModuleType) -> None:
    sizes = {"a": 300, "b": 300, "c": 300}
    chats = chat_turns.scripted_chats(sizes, 60, 6, 0)
    assert [len(chat) for chat in chats] == [6] * 60
    assert all(one[0] != other[0] for chat in chats for one, other in pairwise(chat))
    turns = [turn for chat in chats for turn in chat]
    assert len(set(turns)) == len(turns) and {name for name, _ in turns} == set(sizes)
    assert chats == chat_turns.scripted_chats(sizes, 60, 6, 0) != chat_turns.scripted_chats(sizes, 60, 6, 1)
    assert chat_turns.scripted_chats({"a": 5, "b": 500}, 20, 6, 0), "a small task is gone round"


def test_the_answer_of_each_turn_is_judged_by_itself(chat_turns: ModuleType) -> None:
    engine = Engine(scripted_bundle({"say 0": "0", "say 1": "0", "say 2": "2"}))
    chat = [("echo", number) for number in (0, 1, 2, 0)]
    turns = chat_turns.hold(chat, {"echo": Echo()}, engine.session(), engine.tokenizer)
    assert [turn.right for turn in turns] == [True, False, True, True]
    assert [turn.text for turn in turns] == ["say 0 | 0", "say 1 | 0", "say 2 | 2", "say 0 | 0"]


def test_answers_are_judged_where_the_oldest_turns_were_dropped(chat_turns: ModuleType) -> None:
    engine = Engine(scripted_bundle({"say 0": "0", "say 1": "1", "say 2": "2"}))
    session = engine.session(max_context=60)
    turns = chat_turns.hold([("echo", number % 3) for number in range(9)], {"echo": Echo()}, session, engine.tokenizer)
    assert session.num_dropped > 0
    assert all(turn.right for turn in turns)
