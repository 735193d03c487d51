"""The process that generates, in this one."""

from __future__ import annotations

import asyncio
import time
from multiprocessing import Pipe
from types import SimpleNamespace

import pytest
import torch

from nanochat_pl.engine.events import Event
from nanochat_pl.engine.request import Handle
from nanochat_pl.serving.metrics import Metrics
from nanochat_pl.serving.pool import Updates
from nanochat_pl.serving.worker import Worker, _pieces_of
from tests.helpers.evaluated import make_run
from tests.serving.test_gate import ScriptedGeneration


def test_what_it_is_started_with_reaches_the_scheduler(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundle = make_run("demo")
    spec = {
        "bundle": str(bundle),
        "device": "cpu",
        "num_slots": 3,
        "max_context": 64,
        "prefill_chunk": 7,
        "stream_interval": 0.1,
    }
    scheduler = Worker(Pipe()[0], spec)._scheduler
    assert (scheduler.num_slots, scheduler.max_context, scheduler.prefill_chunk) == (3, 64, 7)


@pytest.mark.slow
def test_compile_reaches_the_engine_and_is_done_before_the_first_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # what it takes is tested with the engine
    spec = {
        "bundle": str(make_run("demo")),
        "device": "cpu",
        "num_slots": 2,
        "max_context": 64,
        "prefill_chunk": 8,
        "stream_interval": 0,
    }
    worker = Worker(Pipe()[0], spec | {"compile": True})
    assert len(worker._engine._compiled._graphs) == 2
    assert Worker(Pipe()[0], spec)._engine._compiled is None


# What is sent, and when.


def settings_of(**more) -> dict:
    return {
        "prompt": "Return",
        "max_tokens": 20,
        "sampling": {"seed": 1},
        "ignore_eos": True,
        "stream": True,
        "details": True,
    } | more


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """One whose clock stands still, and whose messages are kept."""
    monkeypatch.chdir(tmp_path)
    spec = {"bundle": str(make_run("demo")), "device": "cpu", "num_slots": 8, "max_context": 64, "prefill_chunk": 99}
    made = Worker(Pipe()[0], spec | {"stream_interval": 0.1})
    made.sent = []
    monkeypatch.setattr(made, "send", lambda message: made.sent.append(message["updates"]))
    made.clock = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: made.clock)
    return made


def step(worker: Worker, seconds: float) -> dict[str, int]:
    """How many tokens of each answer were sent after a step."""
    worker.clock += seconds
    worker.sent.clear()
    worker._scheduler.step()
    worker._collect()
    worker._hold()
    worker._send_held()
    assert sum(map(bool, worker.sent)) <= 1
    return {name: len(update["tokens"]) for updates in worker.sent for name, update in updates}


def test_a_stream_alone_gets_each_token_and_many_get_several_at_once(worker):
    worker._submit("0", settings_of())
    assert [step(worker, 0.01) for _ in range(3)] == [{"0": 2}, {"0": 1}, {"0": 1}]  # the first step has the prompt
    for name in range(1, 8):
        worker._submit(str(name), settings_of(max_tokens=3 if name == 7 else 20))
    assert step(worker, 0.01) == {"0": 1} | {str(name): 2 for name in range(1, 8)}  # the first token at once
    assert step(worker, 0.01) == {"7": 1}  # and the end
    seven = {str(name) for name in range(7)}  # 320 pieces a second
    assert [step(worker, 0.01) for _ in range(2)] == [{}, dict.fromkeys(seven, 3)]
    assert [step(worker, 0.01) for _ in range(3)] == [{}, {}, dict.fromkeys(seven, 3)]


def test_pieces_wait_no_longer_than_the_interval(worker):
    worker._stream_interval = 0
    for name in range(8):
        worker._submit(str(name), settings_of())
    assert sum(len(step(worker, 0.001)) for _ in range(5)) > 20  # not 40: a token may end within a character


def test_an_answer_that_is_wanted_whole_comes_with_its_first_token_and_its_end(worker):
    worker._submit("0", settings_of(stream=False, max_tokens=5))
    assert [step(worker, 1) for _ in range(4)] == [{"0": 2}, {}, {}, {"0": 3}]


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_pieces_are_sent_between_a_short_forward_and_its_choice(worker, monkeypatch, seconds):
    order = []

    def logits(*given, forward=worker._engine.logits):
        order.append("forward")
        worker.clock += seconds
        return forward(*given)

    def accept(handle, *given, of_handle=Handle.accept):
        order.append("choice")
        of_handle(handle, *given)

    turns = iter(range(9))

    def receive(wait):
        if next(turns, None) is None:
            raise EOFError

    monkeypatch.setattr(worker._engine, "logits", logits)
    monkeypatch.setattr(Handle, "accept", accept)
    monkeypatch.setattr(worker, "_receive", receive)
    monkeypatch.setattr(worker, "send", lambda message: order.append("piece") if message["updates"] else None)
    worker._submit("0", settings_of(max_tokens=9))
    with pytest.raises(EOFError):
        worker.serve()
    before = {order[place - 1] for place, what in enumerate(order[:-1]) if what == "piece"}
    assert before == {"choice" if seconds else "forward"}
    assert order[-2:] == ["choice", "piece"]  # the end, which nothing follows, is sent at once


def test_no_piece_waits_until_the_prompt_of_another_request_has_been_read(worker, monkeypatch):
    order, turns = [], iter([False, True])

    def logits(cache, new, forward=worker._engine.logits):
        order.append("prompt" if len(new[0]) > 1 else "forward")
        return forward(cache, new)

    def receive(wait):
        is_asked = next(turns, None)
        if is_asked is None:
            raise EOFError
        if is_asked:
            worker._submit("1", settings_of(prompt="another one"))

    monkeypatch.setattr(worker._engine, "logits", logits)
    monkeypatch.setattr(worker, "_receive", receive)
    monkeypatch.setattr(worker, "send", lambda message: order.append((len(message["updates"]), message["stats"])))
    worker._submit("0", settings_of())
    with pytest.raises(EOFError):
        worker.serve()
    assert order[:2] == ["prompt", "forward"] and order[3:] == ["prompt", "forward"]
    updates, stats = order[2]
    assert (updates, stats["running"], stats["waiting"]) == (1, 1, 0)  # as they were after the step


def test_calls_and_the_text_around_them_keep_their_order():
    events = [Event("text", "a"), Event("text", "b"), Event("tool_call", "1+1"), Event("tool_result", "2")]
    events += [Event("text", "c"), Event("tool_call", "3"), Event("finished", "stop")]
    call, result = {"type": "tool_call", "text": "1+1"}, {"type": "tool_result", "text": "2"}
    pieces = [([], "ab"), ([call, result], "c"), ([{"type": "tool_call", "text": "3"}], "")]
    assert _pieces_of(events) == pieces and _pieces_of([]) == [([], "")]


# What the server makes of it.


def taken(updates: Updates) -> list:
    return list(iter(updates.take, None))


def test_what_a_reader_has_not_taken_is_joined_in_its_order():
    updates = Updates()
    updates.put(0, {"text": "a", "prompt_tokens": 3, "tokens": [1]})
    updates.put(1, {"text": "x"})
    updates.put(0, {"text": "b", "completion_tokens": 2, "tokens": [2]})
    updates.put(0, {"tools": ["call"]})
    updates.put(0, {"text": "c"})
    updates.put(1, {"error": "e"})
    assert taken(updates) == [
        (0, {"text": "ab", "prompt_tokens": 3, "tokens": [1, 2], "completion_tokens": 2}),
        (1, {"text": "x"}),
        (0, {"tools": ["call"], "text": "c"}),
        (1, {"error": "e"}),
    ]
    for _ in range(100):
        updates.put(0, {"text": "x" * 1000})
    assert 5 < len(taken(updates)) < 12


def test_waiting_for_an_update_ends_with_it_or_with_the_time():
    async def wait() -> list:
        updates = Updates()
        asyncio.get_running_loop().call_later(0.01, updates.put, 0, {"text": "a"})
        await updates.wait(10)
        found = taken(updates)
        await updates.wait(0.01)
        return found + taken(updates)

    assert asyncio.run(wait()) == [(0, {"text": "a"})]


def test_the_time_between_tokens_is_that_of_each_token_of_a_piece(monkeypatch):
    pool = SimpleNamespace(workers=[])
    metrics, generation = Metrics(pool), ScriptedGeneration([])
    for now, tokens in ((1.0, 1), (1.2, 5), (1.28, 6)):
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        metrics.observe(generation, {"completion_tokens": tokens})
    lines = dict(line.rpartition(" ")[::2] for line in metrics.text().decode().splitlines())
    name = "nanochat_inter_token_latency_seconds"
    found = [
        lines[f"{name}_bucket" + f'{{engine="1",le="{bound}",model_name="demo"}}']
        for bound in ("0.025", "0.05", "0.1", "+Inf")
    ]
    assert found == ["0.0", "4.0", "5.0", "5.0"]
    assert lines[f"{name}_count" + '{engine="1",model_name="demo"}'] == "5.0"
