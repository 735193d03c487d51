"""Conversations: golden ids and masks, a slow renderer beside, what is refused, and the way back."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.tokenizer.chat_format import problems_of_conversation
from tests.reference import renderer

USER = {"role": "user", "content": "2*21?"}
PARTS = [
    {"type": "text", "text": "Let me see: "},
    {"type": "python", "text": "2*21"},
    {"type": "python_output", "text": "42"},
    {"type": "text", "text": "It is 42."},
]


@pytest.fixture(scope="module")
def golden_cases(golden: Path) -> list[dict]:
    cases = json.loads((golden / "conversations.json").read_text(encoding="utf-8"))
    assert len(cases) == 5
    return cases


def random_conversation(generator: random.Random) -> dict[str, Any]:
    def text() -> str:
        words = ["the", " dog", "12", "34 ", "\n\n", "'ll", "é", "🌍", "<|bos|>", "<|assistant_end|>", " "]
        return "".join(generator.choices(words, k=generator.randrange(8)))

    def parts() -> list[dict[str, str]]:
        kinds = ["text", "python", "python_output"]
        return [{"type": generator.choice(kinds), "text": text()} for _ in range(generator.randrange(5))]

    messages: list[dict[str, Any]] = []
    if generator.random() < 0.3:
        messages.append({"role": "system", "content": text()})
    for _ in range(generator.randrange(1, 4)):
        messages.append({"role": "user", "content": text()})
        messages.append({"role": "assistant", "content": parts() if generator.random() < 0.5 else text()})
    return {"messages": messages}


def test_golden_conversations(golden_cases: list[dict], golden_tokenizer: Tokenizer) -> None:
    for case in golden_cases:
        rendered = golden_tokenizer.render_conversation(case["conversation"], case.get("max_tokens", 2048))
        assert rendered == (case["ids"], case["mask"])


def test_golden_completion_prompts(golden_cases: list[dict], golden_tokenizer: Tokenizer) -> None:
    cases = [case for case in golden_cases if "completion_prompt_ids" in case]
    assert len(cases) == 4
    for case in cases:
        assert golden_tokenizer.render_for_completion(case["conversation"]) == case["completion_prompt_ids"]


def test_the_slow_renderer_agrees_with_golden_values(golden_cases: list[dict], golden_tokenizer: Tokenizer) -> None:
    encode, special = golden_tokenizer.encode, golden_tokenizer.special_ids
    for case in golden_cases:
        max_tokens = case.get("max_tokens", 2048)
        assert renderer.render(case["conversation"], encode, special, max_tokens) == (case["ids"], case["mask"])
        if "completion_prompt_ids" in case:
            prompt = renderer.render_prompt(case["conversation"], encode, special)
            assert prompt == case["completion_prompt_ids"]


def test_agrees_with_the_slow_renderer(tokenizer: Tokenizer) -> None:
    generator = random.Random(3)
    conversations = [random_conversation(generator) for _ in range(300)]
    for max_tokens in (2048, 20):
        expected = [renderer.render(c, tokenizer.encode, tokenizer.special_ids, max_tokens) for c in conversations]
        assert [tokenizer.render_conversation(c, max_tokens) for c in conversations] == expected
        assert tokenizer.render_conversations(conversations, max_tokens, num_threads=3) == expected
    for conversation in conversations:
        prompt = renderer.render_prompt(conversation, tokenizer.encode, tokenizer.special_ids)
        assert tokenizer.render_for_completion(conversation) == prompt


def test_mask_covers_what_the_assistant_has_to_produce(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer.render_conversation({"messages": [USER, {"role": "assistant", "content": PARTS}]})
    trained = tokenizer.decode([token for token, bit in zip(ids, mask, strict=True) if bit])
    assert trained == "Let me see: <|python_start|>2*21<|python_end|>It is 42.<|assistant_end|>"
    rest = tokenizer.decode([token for token, bit in zip(ids, mask, strict=True) if not bit])
    assert rest == "<|bos|><|user_start|>2*21?<|user_end|><|assistant_start|><|output_start|>42<|output_end|>"


def test_rendering_leaves_the_conversation_alone(tokenizer: Tokenizer) -> None:
    conversation = {
        "messages": [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "42"}]
    }
    before = json.dumps(conversation)
    first = tokenizer.render_conversation(conversation)
    assert tokenizer.render_for_completion(conversation) == first[0][:-3]
    assert tokenizer.render_conversation(conversation) == first
    assert json.dumps(conversation) == before


def test_a_conversation_that_ends_with_the_user_can_be_completed(tokenizer: Tokenizer) -> None:
    answered = {"messages": [USER, {"role": "assistant", "content": "42"}]}
    assert tokenizer.render_for_completion({"messages": [USER]}) == tokenizer.render_for_completion(answered)


def test_a_prompt_keeps_its_end_when_it_is_cut(tokenizer: Tokenizer) -> None:
    whole = tokenizer.render_for_completion({"messages": [USER]})
    cut = tokenizer.render_for_completion({"messages": [USER]}, max_tokens=4)
    assert cut == [*whole[:3], tokenizer.special_ids["<|assistant_start|>"]]


@pytest.mark.parametrize(
    ("conversation", "problems"),
    [
        (None, ["messages: must be a list"]),
        ([USER], ["messages: must be a list"]),
        ({}, ["messages: must be a list"]),
        ({"messages": "hello"}, ["messages: must be a list"]),
        ({"messages": []}, ["messages: there is no user message"]),
        ({"messages": [{"role": "system", "content": "x"}]}, ["messages: there is no user message"]),
        ({"messages": [{"role": "assistant", "content": "x"}]}, ["messages[0].role='assistant': must be 'user'"]),
        ({"messages": [USER, USER]}, ["messages[1].role='user': must be 'assistant'"]),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, ["messages[1].role='tool': must be 'assistant'"]),
        (
            {"messages": [USER, {"role": "system", "content": "x"}, {"content": 1}]},
            ["messages[1].role='system'", "messages[2].role=None", "messages[2].content=1"],
        ),
        ({"messages": [7]}, ["messages[0]: must have a role and a content"]),
        ({"messages": [{"role": "user", "content": None}]}, ["messages[0].content=None: must be text."]),
        ({"messages": [{"role": "user", "content": PARTS}]}, ["messages[0].content=[{"]),
        ({"messages": [USER, {"role": "assistant"}]}, ["messages[1].content=None: must be text or a list of parts"]),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": [{"type": "image", "text": "x"}, {"type": "text"}, 5]},
                ]
            },
            [
                "messages[1].content[0].type='image': must be one of text, python, python_output",
                "messages[1].content[1].text=None: must be text",
                "messages[1].content[2].type=None",
            ],
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": ["text"], "text": "x"}]}]},
            ["messages[1].content[0].type=['text']"],
        ),
    ],
)
def test_problems_are_named_with_their_places(tokenizer: Tokenizer, conversation: Any, problems: list[str]) -> None:
    found = problems_of_conversation(conversation)
    assert len(found) == len(problems)
    for line, expected in zip(found, problems, strict=True):
        assert line.startswith(expected)
    for render in (tokenizer.render_conversation, tokenizer.render_for_completion):
        with pytest.raises(UserError) as caught:
            render(conversation)
        assert list(caught.value.problems) == found


def test_other_keys_are_left_alone(tokenizer: Tokenizer) -> None:
    messages = [{**USER, "id": 5}, {"role": "assistant", "content": "42"}]
    plain = {"messages": [USER, messages[1]]}
    assert tokenizer.render_conversation({"messages": messages, "source": "x"}) == tokenizer.render_conversation(plain)


def answer_ids(tokenizer: Tokenizer, content: Any) -> list[int]:
    """The ids of an assistant's message, from after assistant_start."""
    ids, _ = tokenizer.render_conversation({"messages": [USER, {"role": "assistant", "content": content}]})
    return ids[ids.index(tokenizer.special_ids["<|assistant_start|>"]) + 1 :]


def test_parse_is_the_inverse_of_rendering(tokenizer: Tokenizer) -> None:
    assert tokenizer.parse_assistant(answer_ids(tokenizer, PARTS)) == PARTS
    assert tokenizer.parse_assistant(answer_ids(tokenizer, "It is 42.")) == [{"type": "text", "text": "It is 42."}]
    assert tokenizer.parse_assistant(answer_ids(tokenizer, "")) == []
    empty = [{"type": "python", "text": ""}, {"type": "python_output", "text": ""}]
    assert tokenizer.parse_assistant(answer_ids(tokenizer, empty)) == empty


def test_parse_reads_what_was_not_finished(tokenizer: Tokenizer) -> None:
    ids = answer_ids(tokenizer, PARTS)
    end_of_call = ids.index(tokenizer.special_ids["<|python_end|>"])
    assert tokenizer.parse_assistant(ids[:end_of_call]) == PARTS[:2]
    assert tokenizer.parse_assistant(ids[: end_of_call + 1]) == PARTS[:2]
    assert tokenizer.parse_assistant([]) == []


def test_parse_bears_markers_in_any_order(tokenizer: Tokenizer) -> None:
    special = tokenizer.special_ids
    one, two = tokenizer.encode("1"), tokenizer.encode("2")
    ids = [special["<|python_end|>"], *one, special["<|user_start|>"], *two, special["<|output_end|>"]]
    assert tokenizer.parse_assistant(ids) == [{"type": "text", "text": "12"}]
    ids = [special["<|python_start|>"], *one, special["<|output_end|>"], special["<|output_start|>"], *two]
    assert tokenizer.parse_assistant(ids) == [{"type": "python", "text": "1"}, {"type": "python_output", "text": "2"}]
    ids = [*one, special["<|assistant_end|>"], *two]
    assert tokenizer.parse_assistant(ids) == [{"type": "text", "text": "1"}]


def test_parse_never_fails(tokenizer: Tokenizer) -> None:
    generator = random.Random(11)
    for _ in range(300):
        ids = generator.choices(range(tokenizer.bos_id - 20, tokenizer.vocab_size), k=30)
        parts = tokenizer.parse_assistant(ids)
        assert all(part["type"] in ("text", "python", "python_output") for part in parts)
