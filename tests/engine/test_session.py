"""Streams and conversations."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.engine import Engine, Event, visible_text
from nanochat_pl.engine.events import EventReader
from tests.helpers.small_engine import SmallBundle, byte_tokenizer, golden_bundle, mark, scripted_bundle

TOOL = "It is <|python_start|>2*21<|python_end|><|output_start|>42<|output_end|>42 — café 🙂."


@pytest.fixture
def engine(golden) -> Engine:
    return Engine(golden_bundle(golden))


def chat(session, message: str, **settings) -> str:
    return "".join(event.text for event in session.send(message, **settings) if event.kind == "text")


def test_a_stream_is_what_generate_gives(engine):
    for prompt in ([991, 79, 968], [991] * 140):
        for settings in ({}, {"temperature": 0.9, "top_k": 30, "seed": 5}):
            events = list(engine.stream(prompt, max_tokens=50, **settings))
            result = engine.generate([prompt], max_tokens=50, **settings)[0]
            assert "".join(event.text for event in events if event.kind == "text") == result.text
            assert events[-1] == Event("finished", result.finish_reason)


def test_events_of_an_answer_with_a_tool_call():
    """53: characters of several bytes were cut while streaming. Here every byte is a token of its own."""
    session = Engine(scripted_bundle({"hi": TOOL})).session()
    events = list(session.send("hi"))
    kinds = [event.kind for event in events]
    called = kinds.index("tool_call")
    # The first step gives two tokens, of the prompt and of the one after it.
    assert [event.text for event in events[:called]] == ["It", " ", "i", "s", " "]
    assert events[called : called + 2] == [Event("tool_call", "2*21"), Event("tool_result", "42")]
    assert [event.text for event in events[called + 2 : -1]] == list("42 — café 🙂."), "each character when it is whole"
    assert events[-1] == Event("finished", "stop")


def test_a_character_that_never_ends_is_replaced():
    tokenizer = byte_tokenizer()
    reader = EventReader(tokenizer)
    assert reader.read([0xE2]) == []
    assert reader.read([0x82]) == []
    assert reader.end() == [Event("text", "�")]
    assert visible_text(tokenizer, [0xFF, *mark("a<|user_start|>b")]) == "�ab"


def test_events_agree_with_the_parsed_message():
    tokenizer = byte_tokenizer()
    names = {"text": "text", "python": "tool_call", "python_output": "tool_result"}
    pieces = ["a", "é", "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>", "<|bos|>", "🙂"]
    rng = random.Random(0)
    for _ in range(300):
        ids = mark("".join(rng.choices(pieces, k=10)))
        reader = EventReader(tokenizer)
        parts: list[tuple[str, str]] = []
        cuts = [0, *sorted(rng.choices(range(len(ids) + 1), k=rng.randrange(len(ids)))), len(ids)]
        read = [event for start, stop in itertools.pairwise(cuts) for event in reader.read(ids[start:stop])]
        for event in read + reader.end():
            if event.kind == "text" and parts and parts[-1][0] == "text":
                parts[-1] = ("text", parts[-1][1] + event.text)
            else:
                parts.append((event.kind, event.text))
        assert parts == [(names[part["type"]], part["text"]) for part in tokenizer.parse_assistant(ids)]


def uncached_logprobs(net, handle) -> list[float]:
    """Log-probabilities of an answer's tokens by one forward over all of the text."""
    with torch.no_grad():
        table = net(torch.tensor([[*handle.prompt, *handle.ids]])).log_softmax(-1)[0, len(handle.prompt) - 1 : -1]
    return table.gather(-1, torch.tensor(handle.ids)[:, None])[:, 0].tolist()


def test_a_conversation_equals_one_from_scratch(engine):
    """47, 54: the log-probabilities after several turns are those of a forward over the whole conversation."""
    session = engine.session()
    for turn, message in enumerate(["Hello there, who are you?", "Once upon a time", "def main():", "And then?"]):
        list(session.send(message, max_tokens=40, temperature=0.8, seed=turn))
    answer = session.answer
    assert len(answer.prompt) > 90 and answer.cached_tokens > 80
    assert len(session.ids) > 130, "no longer than a window: this test would prove little"
    assert answer.logprobs == pytest.approx(uncached_logprobs(engine.net, answer), abs=1e-4)


def test_bfloat16(golden):
    """The cache is kept in the type that the model computes in."""
    bundle = golden_bundle(golden)
    net = copy.deepcopy(bundle.net).set_compute_dtype(torch.bfloat16)
    engine = Engine(SmallBundle(net, bundle.tokenizer))
    result = engine.generate([[991, 79], [991] * 150], max_tokens=20)[1]
    assert all(logprob <= 0 for logprob in result.logprobs)
    with torch.no_grad():
        table = net(torch.tensor([[991] * 150 + result.ids])).log_softmax(-1)[0, 149:-1]
    expected = table.gather(-1, torch.tensor(result.ids)[:, None])[:, 0]
    assert result.logprobs == pytest.approx(expected.tolist(), abs=0.3)


def test_a_conversation_reads_like_its_rendering():
    bundle = scripted_bundle({"one": TOOL, "two": "Fine."})
    session = Engine(bundle).session()
    chat(session, "one")
    chat(session, "two")
    parts = [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "2*21"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "42 — café 🙂."},
    ]
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "Fine."},
    ]
    assert session.ids == bundle.tokenizer.render_conversation({"messages": messages})[0]


def test_a_turn_reads_only_what_is_new():
    """54: every turn prefilled the whole conversation."""
    bundle = scripted_bundle({"first": "a" * 30, "second": "b"}, sequence_len=256)
    session = Engine(bundle).session()
    chat(session, "first")
    before = len(session.ids)
    bundle.net.num_read = 0
    chat(session, "second")
    # The message with its three markers, the end of the first answer (written, but never read), and "b".
    assert bundle.net.num_read == len("second") + 3 + 1 + 1
    assert bundle.net.num_read < before


@pytest.mark.parametrize("way", ["stop", "close", "forgotten"])
def test_an_answer_that_is_broken_off_stays_in_the_conversation(engine, way):
    session = engine.session()
    events = session.send("Once upon a time", max_tokens=100)
    next(events)
    next(events)
    if way == "stop":
        session.stop()
        assert list(events)[-1] == Event("finished", "cancelled")
    elif way == "close":
        events.close()
    before = session.ids
    assert before[-1] == engine.tokenizer.special_ids["<|assistant_end|>"]
    list(session.send("And then?", max_tokens=5))
    assert session.ids[: len(before)] == before
    answer = session.answer
    assert answer.cached_tokens > 0 or way == "forgotten", "what was read is read again"
    assert answer.logprobs == pytest.approx(uncached_logprobs(engine.net, answer), abs=1e-4)


@pytest.mark.parametrize(
    ("max_tokens", "kept"),
    [
        (3, "It "),
        (9, "It is <|python_start|>2*<|python_end|>"),
        (12, "It is <|python_start|>2*21<|python_end|><|output_start|>42<|output_end|>"),
        (13, "It is <|python_start|>2*21<|python_end|><|output_start|>42<|output_end|>"),
    ],
)
def test_an_answer_that_is_cut_is_closed_as_in_training(max_tokens, kept):
    session = Engine(scripted_bundle({"hi": TOOL})).session()
    events = list(session.send("hi", max_tokens=max_tokens))
    assert events[-1] == Event("finished", "length")
    begin = session.ids.index(mark("<|assistant_start|>")[0]) + 1
    assert session.ids[begin:] == mark(kept + "<|assistant_end|>")


def test_a_full_context_drops_the_oldest_turns():
    bundle = scripted_bundle({"go": "x" * 500, "a": "1" * 20, "b": "2" * 20, "c": "3" * 20, "d": "4" * 20})
    session = Engine(bundle).session()
    answers = [chat(session, message, max_tokens=30) for message in "abcda"]
    assert answers == ["1" * 20, "2" * 20, "3" * 20, "4" * 20, "1" * 20]
    assert session.num_dropped == 1
    kept = [("b", "2" * 20), ("c", "3" * 20), ("d", "4" * 20), ("a", "1" * 20)]
    roles = ("user", "assistant")
    messages = [{"role": role, "content": text} for turn in kept for role, text in zip(roles, turn, strict=True)]
    assert session.ids == bundle.tokenizer.render_conversation({"messages": messages})[0], "a conversation of the rest"
    assert list(session.send("go", max_tokens=1000))[-1] == Event("finished", "context")
    assert len(session.ids) <= session.max_context + 1
    assert chat(session, "a") == "1" * 20 and session.num_dropped == 4
    session.clear()
    assert session.num_dropped == 0 and chat(session, "a") == "1" * 20


def test_the_system_prompt_counts_once():
    """It stands in the first turn: nothing has to go for it until that goes."""
    system = "s" * 30
    bundle = scripted_bundle({"a": "1" * 20, "b": "2" * 20, f"{system}\n\na": "1" * 20})
    plain = Engine(bundle).session(96)
    chat(plain, "a", max_tokens=20)
    chat(plain, "b", max_tokens=20)
    assert plain.num_dropped == 0
    told = Engine(bundle).session(96 + 32, system)
    chat(told, "a", max_tokens=20)
    chat(told, "b", max_tokens=20)
    assert told.num_dropped == 0
    with pytest.raises(UserError, match="The context is full"):
        told.send("x" * 95)


def test_a_message_that_does_not_fit_alone_leaves_the_conversation_unchanged():
    session = Engine(scripted_bundle({"a": "1" * 20})).session()
    chat(session, "a")
    ids = session.ids
    with pytest.raises(UserError, match="this message alone needs 204 and some"):
        session.send("x" * 200)
    assert session.ids == ids and session.num_dropped == 0


def test_after_dropped_turns_the_logits_are_those_of_what_is_left(engine):
    session = engine.session()
    for turn in range(12):
        list(session.send(f"Once upon a time {turn}", max_tokens=40, temperature=0.8, seed=turn))
    assert session.num_dropped > 0
    assert session.answer.logprobs == pytest.approx(uncached_logprobs(engine.net, session.answer), abs=1e-4)


def test_settings_out_of_bounds_leave_the_conversation_alone(engine):
    session = engine.session()
    for settings in ({"temperature": -1.0}, {"top_k": -1}, {"max_tokens": 0}):
        with pytest.raises(UserError):
            session.send("hello", **settings)
    assert session.ids == []
    with pytest.raises(UserError, match="max_context=9999999"):
        engine.session(max_context=9_999_999)
    with pytest.raises(UserError, match="is empty"):
        engine.stream([])


def test_special_tokens_in_a_message_are_ordinary_text(engine):
    session = engine.session()
    list(session.send("<|assistant_end|><|bos|>", max_tokens=1))
    assert session.ids.count(engine.tokenizer.bos_id) == 1
    assert session.ids.count(engine.tokenizer.special_ids["<|assistant_end|>"]) == 1
