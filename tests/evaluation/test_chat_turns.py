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
    held = chat_turns.hold([[("echo", number) for number in (0, 1, 2, 0)]] * 2, {"echo": Echo()}, engine)
    assert [[turn.right for turn in chat.turns] for chat in held] == [[True, False, True, True]] * 2
    assert [chat.num_dropped for chat in held] == [0, 0]


def test_the_oldest_turns_go_as_in_a_chat(chat_turns: ModuleType) -> None:
    engine = Engine(scripted_bundle({"say 0": "0" * 20, "say 1": "1", "say 2": "2" * 20}))
    script, session = [0, 2, 0, 2, 0, 1, 2], engine.session()
    held = chat_turns.hold([[("echo", number) for number in script]], {"echo": Echo()}, engine)[0]
    for number in script:
        list(session.rank_zero_print(f"say {number}"))
    assert held.num_dropped == session.num_dropped > 0
    assert engine.tokenizer.render_conversation({"messages": held.messages})[0] == session.ids
