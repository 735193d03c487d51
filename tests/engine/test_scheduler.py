"""The scheduler: requests that come and go, each with the answer that it would be given alone."""

from __future__ import annotations

import gc
import random
import sys

import pytest
import torch

from nanochat_pl.common.errors import NotFiniteError, UserError
from nanochat_pl.engine import Engine
from nanochat_pl.engine.request import Handle, Request
from nanochat_pl.engine.sampling import Sampling
from nanochat_pl.engine.scheduler import Scheduler, groups_of_like
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from tests.helpers.small_engine import SmallBundle, byte_tokenizer, mark, scripted_bundle

CONTEXT = 160


def small_engine(dtype: str = "bfloat16") -> Engine:
    """Two layers, grouped queries, weights that have an opinion."""
    settings = ModelSettings(depth=2, aspect_ratio=24, head_dim=16, num_kv_heads=1, sequence_len=128)
    net = init_weights(GPT(resolve_model(settings, byte_tokenizer().vocab_size, compute_dtype=dtype)).materialise())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "c_proj" in name or "lm_head" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return Engine(SmallBundle(net.eval(), byte_tokenizer()))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return small_engine()


def random_requests(count: int, seed: int = 0) -> list[Request]:
    """Mixed lengths and settings; some prompts begin alike, some are equal."""
    rng = random.Random(seed)
    beginnings = [[rng.randrange(256) for _ in range(rng.randrange(1, 70))] for _ in range(5)]
    settings = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.2, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.3},
    ]
    requests = []
    for number in range(count):
        prompt = [*rng.choice(beginnings), *(rng.randrange(256) for _ in range(rng.choice([0, 1, 5, 60])))]
        requests.append(
            Request(
                prompt,
                max_tokens=rng.choice([1, 4, 17, 30]),
                sampling=Sampling(**rng.choice(settings), seed=number),
                stop_ids=frozenset(rng.sample(range(256), rng.choice([0, 8]))),
                stop_texts=rng.choice([(), ("a", "xy")]),
                top_logprobs=rng.choice([0, 0, 3]),
            )
        )
    return requests


def greedy_answers(engine: Engine, seed: int) -> list[Handle]:
    """To random requests without sampling, from slots in which beginnings of prompts are used again."""
    scheduler = Scheduler(engine, 7, CONTEXT, prefill_chunk=48)
    handles = [
        scheduler.submit(Request(each.prompt, max_tokens=64, stop_ids=each.stop_ids, sampling=Sampling(0.0)))
        for each in random_requests(12, seed)
    ]
    scheduler.run(handles)
    assert scheduler.num_cached_tokens > 50
    return handles


def answer_of(handle: Handle) -> tuple:
    return (handle.ids, handle.logprobs, handle.sampled_logprobs, handle.top_logprobs, handle.finish_reason)


def alone(engine: Engine, request: Request) -> Handle:
    scheduler = Scheduler(engine, 1, CONTEXT)
    handle = scheduler.submit(request)
    scheduler.run([handle])
    return handle


@pytest.mark.parametrize("count", [80, pytest.param(200, marks=pytest.mark.slow)])
def test_many_requests_get_the_answers_that_they_get_alone(engine, count):
    """In bfloat16 on a CPU to the bit: whoever else is generated, joins, leaves, shares a beginning or is cancelled."""
    rng = random.Random(1)
    requests = random_requests(count)
    scheduler = Scheduler(engine, 9, CONTEXT, prefill_chunk=48)
    waiting, handles, cancelled = list(enumerate(requests)), {}, {}
    while waiting or not scheduler.idle:
        for _ in range(min(len(waiting), rng.choice([0, 0, 1, 2, 5]))):
            number, request = waiting.pop(0)
            handles[number] = scheduler.submit(request)
        scheduler.step()
        unfinished = [number for number, handle in handles.items() if handle.finish_reason is None]
        if unfinished and rng.random() < 0.1:
            number = rng.choice(unfinished)
            handles[number].cancel()
            cancelled[number] = list(handles[number].ids)
    assert len(cancelled) > count // 20 and scheduler.num_cached_tokens > 5 * count
    for number, request in enumerate(requests):
        expected = alone(engine, request)
        if number in cancelled:
            assert handles[number].finish_reason == "cancelled"
            assert handles[number].ids == cancelled[number] == expected.ids[: len(cancelled[number])]
        else:
            assert answer_of(handles[number]) == answer_of(expected), number


def test_in_float32_the_tokens_are_equal_and_the_log_probabilities_close():
    engine = small_engine("float32")
    requests = random_requests(60, seed=2)
    scheduler = Scheduler(engine, 8, CONTEXT, prefill_chunk=48)
    handles = [scheduler.submit(request) for request in requests]
    scheduler.run(handles)
    for request, handle in zip(requests, handles, strict=True):
        expected = alone(engine, request)
        assert (handle.ids, handle.finish_reason) == (expected.ids, expected.finish_reason)
        assert handle.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_a_warm_prefix_changes_nothing_at_any_cut(engine):
    """Another request's prompt and answer are in the slot up to each place, after a stop, an end and a cancel."""
    text = [random.Random(3).randrange(256) for _ in range(60)]
    request = Request(text, max_tokens=6, sampling=Sampling(1.0, seed=5), stop_ids=frozenset())
    cold = answer_of(alone(engine, request))
    before = {
        "length": {},
        "stop text": {"stop_texts": ("a", "e", "i", "o", "u", "\x00", "x", "7")},
        "cancel": {"max_tokens": 90},
    }
    for how, settings in before.items():
        for cut in range(1, len(text) + 1, 1 if how == "length" else 4):
            scheduler = Scheduler(engine, 2, CONTEXT)
            first = scheduler.submit(
                Request(text[:cut], **{"max_tokens": 3, "stop_ids": frozenset(), "sampling": Sampling(1.0)} | settings)
            )
            for _ in range(4):
                scheduler.step()
            first.cancel()
            warm = scheduler.submit(request)
            scheduler.run([warm])
            assert answer_of(warm) == cold, (how, cut)
            assert warm.cached_tokens >= min(cut, len(text) - 1) or cut < 16, (how, cut)


def test_a_prompt_that_goes_on_after_an_answer_reads_only_what_is_new(engine):
    scheduler = Scheduler(engine, 3, CONTEXT)
    first = scheduler.submit(Request(list(range(40)), max_tokens=10, stop_ids=frozenset()))
    scheduler.run([first])
    second = scheduler.submit(Request([*first.prompt, *first.ids, 7], max_tokens=2))
    scheduler.run([second])
    assert second.cached_tokens == 40 + 10 - 1  # the last token of an answer is never read


def test_samples_of_one_prompt_share_its_reading(engine):
    prompt = list(range(50))
    requests = [Request(prompt, 5, Sampling(1.0, seed=seed), frozenset()) for seed in range(8)]
    scheduler = Scheduler(engine, 8, CONTEXT)
    handles = [scheduler.submit(request) for request in requests]
    scheduler.run(handles)
    assert [handle.cached_tokens for handle in handles] == [0, *[49] * 7]
    assert len({tuple(handle.ids) for handle in handles}) == 8
    assert [answer_of(handle) for handle in handles] == [answer_of(alone(engine, each)) for each in requests]


def test_no_token_waits_for_more_than_one_chunk_of_prompts(engine, monkeypatch):
    positions = []
    plain = engine.logits

    def counted(cache, rows):
        positions.append(len(rows) * max(map(len, rows)) if max(map(len, rows)) > 1 else 0)
        return plain(cache, rows)

    scheduler = Scheduler(engine, 6, CONTEXT, prefill_chunk=32)
    running = scheduler.submit(Request([1], max_tokens=60, stop_ids=frozenset()))
    scheduler.step()
    monkeypatch.setattr(engine, "logits", counted)
    long = [scheduler.submit(Request([*range(100), number], max_tokens=3)) for number in range(4)]
    while scheduler.num_running > 1 or scheduler.num_waiting:
        before, generated = len(positions), len(running.ids)
        scheduler.step()
        assert sum(positions[before:]) <= 32
        assert len(running.ids) == generated + 1
    assert all(handle.finish_reason for handle in long)


def test_a_cancelled_request_frees_its_slot_in_the_next_step(engine):
    scheduler = Scheduler(engine, 2, CONTEXT, prefill_chunk=8)
    generated = scheduler.submit(Request([1, 2], max_tokens=90, stop_ids=frozenset()))
    scheduler.step()
    in_part = scheduler.submit(Request(list(range(60)), max_tokens=90))
    queued = scheduler.submit(Request([5], max_tokens=90))
    last = scheduler.submit(Request([6], max_tokens=2))
    scheduler.step()
    assert (scheduler.num_running, scheduler.num_waiting, in_part.ids) == (2, 2, [])
    for handle in (generated, in_part, queued):
        handle.cancel()
    scheduler.step()
    assert {generated.finish_reason, in_part.finish_reason, queued.finish_reason} == {"cancelled"}
    assert last.ids and scheduler.num_waiting == 0
    scheduler.run([last])
    assert scheduler.idle


@pytest.mark.slow
def test_a_thousand_abandoned_requests_leave_nothing_behind(engine):
    scheduler = Scheduler(engine, 4, CONTEXT, prefill_chunk=16)
    rng = random.Random(0)

    def abandon(count: int) -> None:
        for number in range(count):
            handle = scheduler.submit(Request([rng.randrange(256) for _ in range(20)], max_tokens=50))
            for _ in range(number % 3):  # in the queue, while its prompt is read, while it is generated
                scheduler.step()
            handle.cancel()
            del handle
        scheduler.step()

    abandon(100)
    gc.collect()
    objects = len(gc.get_objects())
    abandon(1000)
    gc.collect()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.idle) == (0, 0, True)
    assert len(gc.get_objects()) - objects < 200  # fewer than before: other tests' garbage went meanwhile
    assert not [each for each in gc.get_objects() if isinstance(each, Handle) and each.finish_reason == "cancelled"]


def test_weights_that_are_not_finite_end_only_what_they_spoil(engine, monkeypatch):
    plain = engine.logits

    def spoilt(cache, rows):
        logits = plain(cache, rows).clone()
        logits[[row[0] == 66 for row in rows]] = torch.nan
        return logits

    monkeypatch.setattr(engine, "logits", spoilt)
    scheduler = Scheduler(engine, 2, CONTEXT)
    fine, wrong = (scheduler.submit(Request([first], max_tokens=3, stop_ids=frozenset())) for first in (65, 66))
    scheduler.run([fine, wrong])
    assert (fine.finish_reason, len(fine.ids)) == ("length", 3)
    assert (wrong.finish_reason, wrong.ids) == ("error", [])
    with pytest.raises(NotFiniteError):
        engine.generate([[65], [66]])


def test_what_is_not_finite_does_not_stay_in_a_slot(engine):
    """Behind a mask it has the weight 0, and 0 times infinity is no number: the next short prompt was spoilt by it."""
    scheduler = Scheduler(engine, 1, CONTEXT)
    wrong = scheduler.submit(Request([66] * 20, max_tokens=9, stop_ids=frozenset()))
    scheduler.step()
    scheduler._cache.memory.fill_(torch.inf)
    scheduler.run([wrong])
    assert wrong.finish_reason == "error"
    short = scheduler.submit(Request([66] * 3, max_tokens=9, stop_ids=frozenset()))
    scheduler.run([short])
    (alone,) = engine.generate([[66] * 3], max_tokens=9, stop_ids=(), tools=False)
    assert (short.finish_reason, short.ids) == ("length", alone.ids)


@pytest.mark.parametrize("when", ["forward", "after it"])
def test_a_step_that_was_broken_off_is_taken_again(engine, monkeypatch, when):
    """Ctrl-C, or memory that ran out, anywhere in a step."""
    requests = random_requests(12, seed=4)
    scheduler = Scheduler(engine, 4, CONTEXT, prefill_chunk=24)
    handles = [scheduler.submit(request) for request in requests]
    owner, name = (engine, "logits") if when == "forward" else (scheduler, "_sampler_of")
    plain, rng = getattr(owner, name), random.Random(0)

    def interrupted(*arguments):
        if rng.random() < 0.3:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(owner, name, interrupted)
    breaks = 0
    while not scheduler.idle:
        try:
            scheduler.step()
        except KeyboardInterrupt:
            breaks += 1
    monkeypatch.undo()
    assert breaks > 5
    assert [answer_of(handle) for handle in handles] == [answer_of(alone(engine, each)) for each in requests]


def test_top_logprobs_are_those_of_the_tokens(engine):
    handle = alone(engine, Request([1, 2, 3], 8, Sampling(1.0), frozenset(), top_logprobs=4))
    greedy = alone(engine, Request([1, 2, 3], 8, stop_ids=frozenset(), top_logprobs=1))
    assert [len(row) for row in handle.top_logprobs] == [4] * 8
    assert [row[0] for row in greedy.top_logprobs] == list(zip(greedy.ids, greedy.logprobs, strict=True))
    for token, logprob, row in zip(handle.ids, handle.logprobs, handle.top_logprobs, strict=True):
        assert dict(row).get(token, logprob) == logprob
        assert [value for _, value in row] == sorted((value for _, value in row), reverse=True)


def test_text_before_a_stop_text_is_shown_once_it_cannot_become_one(engine):
    free = engine.generate([[65]], max_tokens=30, stop_ids=[])[0]
    place = next(n for n in range(5, 25) if free.text.find(free.text[n : n + 3]) == n)
    before, stop = free.text[:place], free.text[place : place + 3]
    scheduler = Scheduler(engine, 1, CONTEXT)
    handle = scheduler.submit(Request([65], 30, stop_ids=frozenset(), stop_texts=(stop, stop[:2] + "\x01")))
    shown = ""
    while handle.finish_reason is None:
        scheduler.step()
        shown += "".join(event.text for event in handle.read_events() if event.kind == "text")
        assert before.startswith(shown)
    assert shown == before == engine.generate([[65]], max_tokens=30, stop_ids=[], stop_texts=[stop])[0].text


def test_an_answer_goes_on_after_any_of_its_tokens_as_if_it_had_not_been_cut():
    """In the midst of a character, of an expression, of its result."""
    answer = "ä: <|python_start|>2*21<|python_end|><|output_start|>42<|output_end|> it is"
    engine = Engine(scripted_bundle({"hi": answer}))
    prompt = mark("<|bos|><|user_start|>hi<|user_end|><|assistant_start|>")

    def events_of(handle: Handle) -> list[tuple[str, str]]:
        events = [("text", "")]
        for event in handle.read_events():
            if event.kind == "text" and events[-1][0] == "text":
                events[-1] = ("text", events[-1][1] + event.text)
            else:
                events.append((event.kind, event.text))
        return events

    whole = alone(engine, Request(prompt, 60))
    assert whole.ids == [*mark(answer), *mark("<|assistant_end|>")]
    expected = events_of(whole)
    for place in range(1, len(whole.ids)):
        rest = alone(engine, Request(prompt + whole.ids[:place], 60, begun=place))
        assert (rest.ids, rest.forced) == (whole.ids[place:], whole.forced[place:])
        assert events_of(rest) == expected


def test_a_result_of_ones_own_stands_in_the_place_of_the_calculators():
    engine = Engine(scripted_bundle({"hi": "<|python_start|>2*21<|python_end|><|output_start|>7<|output_end|> it is"}))
    prompt = mark("<|bos|><|user_start|>hi<|user_end|><|assistant_start|>")
    begun = mark("<|python_start|>2*21<|python_end|><|output_start|>7")
    handle = alone(engine, Request(prompt + begun, 60, begun=len(begun)))
    assert handle.ids == mark("<|output_end|> it is<|assistant_end|>") and not any(handle.forced)


def test_changed_weights_use_no_prefix_of_the_old_ones():
    engine = small_engine()
    scheduler = Scheduler(engine, 2, CONTEXT)
    request = Request(list(range(40)), 6, Sampling(1.0, seed=1), frozenset())
    before = scheduler.submit(request)
    scheduler.run([before])
    with torch.no_grad():
        for parameter in engine.net._source[0].parameters():
            parameter.mul_(1.1)
    after = scheduler.submit(request)
    scheduler.run([after])
    assert after.cached_tokens == 0
    assert answer_of(after) == answer_of(alone(engine, request)) != answer_of(before)
    again = scheduler.submit(request)
    scheduler.run([again])
    assert again.cached_tokens == 39 and answer_of(again) == answer_of(after)


def test_top_logprobs_do_not_depend_on_what_others_ask_for(engine):
    scheduler = Scheduler(engine, 2, CONTEXT)
    few, many = (Request([1, 2, 3], 20, Sampling(1.0, seed=2), frozenset(), top_logprobs=n) for n in (5, 20))
    handles = [scheduler.submit(each) for each in (few, many)]
    scheduler.run(handles)
    assert handles[0].top_logprobs == alone(engine, few).top_logprobs
    assert handles[0].top_logprobs == [row[:5] for row in handles[1].top_logprobs]


def test_stop_texts_are_looked_for_in_the_text_alone():
    """Not in what the calculator is given and gives, and not across it."""
    answer = "ab<|python_start|>2*21<|python_end|><|output_start|>42<|output_end|>is 42."
    bundle = scripted_bundle({"x": answer})
    prompt = bundle.tokenizer.render_for_completion({"messages": [{"role": "user", "content": "x"}]})
    for stop, text in (("4", "abis "), ("2*", "abis 42."), ("bi", "abis 42."), ("s 4", "abi")):
        assert Engine(bundle).generate([prompt], stop_texts=[stop])[0].text == text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [1] * CONTEXT}, f"the context is {CONTEXT}"),
        ({"max_tokens": 2.5}, "max_tokens=2.5: must be a whole number"),
        ({"max_tokens": None}, "max_tokens=None"),
        ({"max_context": 0}, "max_context=0"),
        ({"stop_texts": "abc"}, "stop_texts='abc': must be a list"),
        ({"temperature": None}, "temperature=None: must be a number"),
        ({"prompt": [9999]}, "outside 0 …"),
        ({"max_tokens": -1}, "max_tokens=-1: must be a whole number, at least 1"),
        ({"stop_ids": frozenset([9999])}, "stop_ids: 9999 is outside"),
        ({"stop_texts": ("a", "")}, "stop_texts: an empty one"),
        ({"top_logprobs": 21}, "top_logprobs=21: must be 0 … 20"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0: must be above 0"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
    ],
)
def test_requests_that_cannot_be_met_are_refused_at_once(engine, settings, words):
    scheduler = Scheduler(engine, 1, CONTEXT)
    names = ("temperature", "top_p", "min_p", "repetition_penalty")
    sampling = {key: value for key, value in settings.items() if key in names}
    others = {key: value for key, value in settings.items() if key not in sampling}
    with pytest.raises(UserError) as error:
        scheduler.submit(Request(**{"prompt": [1]} | others, sampling=Sampling(**sampling)))
    assert words in str(error.value)
    assert scheduler.idle


def test_pools_that_cannot_be_are_refused(engine):
    for arguments in (
        {"num_slots": 0},
        {"num_slots": 1, "max_context": sys.maxsize},
        {"num_slots": 1, "max_context": 0},
    ):
        with pytest.raises(UserError):
            engine.scheduler(**arguments)


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([5], [(0, 1)]),
        ([90, 80, 70, 60], [(0, 4)]),  # 60 of padding
        ([96, 60, 50, 40, 16], [(0, 3), (3, 5)]),
        ([16, 20, 200, 210], [(0, 2), (2, 4)]),  # the first two would be padded by 364
        ([10] * 50, [(0, 50)]),
    ],
)
def test_prompts_are_read_with_others_of_like_length(lengths: list[int], groups: list[tuple[int, int]]) -> None:
    assert list(groups_of_like(lengths)) == groups
