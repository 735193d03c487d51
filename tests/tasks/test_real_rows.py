"""Every row of the real data sets becomes a conversation, tokens, and the same conversation again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from nanochat_pl.common.schema import build
from nanochat_pl.tasks.base import Split, Task
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.mixture import build_tasks
from nanochat_pl.tasks.registry import all_tasks
from nanochat_pl.tasks.settings import MixtureSettings
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.tools.sandbox.settings import SandboxSettings
from tests.reference.golden_tokenizer import load_golden_tokenizer

SPLITS: tuple[Split, Split] = ("train", "test")
TABLES = ("arc_challenge", "arc_easy", "gsm8k", "humaneval", "mmlu")
CONVERSATIONS = (
    "OpenAssistant/oasst-en100-messages",
    "alexa/topical-chat-messages",
    "google-research-datasets/schema-guided-dialogue-messages",
    "mosaicml/dolly_hhrlhf-small-messages",
)
NUM_ROWS = 1_119 + 1_172 + 2_251 + 2_376 + 7_473 + 1_319 + 164 + 1_218 + 14_042
SAMPLE = 40  # rows of each part in the fast suite


def tasks_of_tables(shared: Path, cache: Path) -> Iterator[Task]:
    context = TaskContext(cache, hub=shared / "data/hub", sandbox=SandboxSettings(mode="weak"))
    for name in TABLES:
        kind = all_tasks()[name]
        for split in SPLITS[name == "humaneval" :]:
            yield kind.cls.from_settings(kind.settings(), split, context)


def tasks_of_conversations(shared: Path, cache: Path) -> Iterator[Task]:
    paths = {repo.split("/")[1]: {"path": str(shared / "data/hub/datasets" / repo)} for repo in CONVERSATIONS}
    settings = build(MixtureSettings, {"tasks": {"conversations": paths}})
    for split in SPLITS:
        yield from build_tasks(settings.tasks, split, TaskContext(cache)).values()


def read_back(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[int]) -> list[dict[str, Any]]:
    """The messages that ids with their mask stand for: written for tests, by the recipe's section 2 alone."""
    special = tokenizer.special_ids
    assert len(ids) == len(mask) and ids[0] == special["<|bos|>"] and not mask[0]
    messages, at = [], 1
    while at < len(ids):
        role = {special["<|user_start|>"]: "user", special["<|assistant_start|>"]: "assistant"}[ids[at]]
        end = ids.index(special[f"<|{role}_end|>"], at)
        if role == "user":
            assert not any(mask[at : end + 1])
            messages.append({"role": role, "content": tokenizer.decode(ids[at + 1 : end])})
        else:
            assert not mask[at] and mask[end]
            parts = tokenizer.parse_assistant(ids[at + 1 : end + 1])
            messages.append({"role": role, "content": parts})
        at = end + 1
    return messages


def as_parts(content: str | Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Content as what comes back: a text is one part, an empty one none."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    return [part for part in parts if part["text"] or part["type"] != "text"]


def check(task: Task, indices: Sequence[int], tokenizer: Tokenizer) -> None:
    for index in indices:
        conversation = task[index]
        ids, mask = tokenizer.render_conversation(conversation, max_tokens=10**6)
        messages = conversation["messages"]
        expected = [
            message if message["role"] == "user" else {"role": "assistant", "content": as_parts(message["content"])}
            for message in messages
        ]
        assert read_back(tokenizer, ids, mask) == expected, f"{task.name} {task.split} {index}"
        prompt = tokenizer.render_for_completion(conversation)
        assert ids[: len(prompt)] == prompt
        if task.judged and task.name != "humaneval":  # that one is judged by running it
            answer = tokenizer.parse_assistant(ids[len(prompt) :])
            assert task.evaluate(conversation, answer)
        if task.kind == "categorical":
            letters = task.letters(conversation)
            assert messages[-1]["content"] in letters and all(len(tokenizer.encode(letter)) == 1 for letter in letters)
            # Each letter stands right behind its choice, in order.
            asked = messages[0]["content"]
            places = [asked.rindex(f"={letter}\n") for letter in letters]
            assert places == sorted(places) and asked.startswith("Multiple Choice question: ")


def sample(task: Task) -> range:
    return range(0, len(task), max(1, len(task) // SAMPLE))


def test_some_rows_of_each_table(shared: Path, golden: Path, tmp_path: Path) -> None:
    tokenizer = load_golden_tokenizer(golden)
    for task in tasks_of_tables(shared, tmp_path):
        check(task, sample(task), tokenizer)


@pytest.mark.slow
def test_all_rows_of_all_tables(shared: Path, golden: Path, tmp_path: Path) -> None:
    tokenizer, num_rows = load_golden_tokenizer(golden), 0
    for task in tasks_of_tables(shared, tmp_path):
        check(task, range(len(task)), tokenizer)
        num_rows += len(task)
    assert num_rows == NUM_ROWS


@pytest.mark.slow
def test_all_real_conversations(shared: Path, golden: Path, tmp_path: Path) -> None:
    tokenizer = load_golden_tokenizer(golden)
    sizes = {}
    for task in tasks_of_conversations(shared, tmp_path):
        check(task, range(len(task)), tokenizer)
        sizes[task.name, task.split] = len(task)
    assert sum(sizes.values()) == 512 + 52 + 1617 + 539 + 6000 + 600 + 900 + 100
