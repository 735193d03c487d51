"""What requests may ask for, and what they get where they say nothing: without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build
from nanochat_pl.serving.errors import ApiError
from nanochat_pl.serving.jobs import Jobs
from nanochat_pl.serving.pool import Pool
from nanochat_pl.serving.requests import ChatRequest, CompletionRequest, ResponsesRequest
from nanochat_pl.serving.responses import response_body
from nanochat_pl.serving.settings import ServeSettings


def jobs(waiting: int = 0, free: int = 16, **settings: Any) -> Jobs:
    pool: Any = SimpleNamespace(models={"demo": {}}, num_waiting=waiting, free_slots=lambda model: free)
    return Jobs(pool, build(ServeSettings, settings))


def chat(*messages: tuple[str, str], **more: Any) -> ChatRequest:
    return ChatRequest(messages=[{"role": role, "content": text} for role, text in messages], **more)


@pytest.mark.parametrize("limits", [{"temperature": 0.5}, {"top_k": 20}, {"max_tokens": 100}])
def test_a_limit_below_the_default_is_refused_at_the_start(limits: dict[str, float]) -> None:
    """Else each request that says nothing of it would be refused."""
    (name,) = limits
    with pytest.raises(UserError, match=rf"sampling\.{name}=.*: exceeds limits\.{name}="):
        jobs(limits=limits)
    jobs(limits=limits, sampling=limits).of_chat(chat(("user", "Hello")))


def test_answers_of_any_length_can_be_sent_back() -> None:
    """The server's own answer may be longer than a message of a user."""
    long = "word " * 3_000
    job = jobs().of_chat(chat(("user", "Tell a story."), ("assistant", long), ("user", "Go on.")))
    assert job.asked[0]["messages"][1]["content"] == long
    with pytest.raises(ApiError, match="15,000 characters are more than the 8,000 allowed"):
        jobs().of_chat(chat(("user", long)))
    with pytest.raises(ApiError, match="more than the 32,000 characters allowed in all"):
        jobs().of_chat(chat(("user", "a"), ("assistant", 3 * long), ("user", "b")))


@pytest.mark.parametrize("given", [{}, {"max_tokens": None}])
def test_a_completion_has_sixteen_tokens_where_nothing_is_said(given: dict[str, None]) -> None:
    assert jobs().of_completion(CompletionRequest(prompt="a", **given), ["a"]).asked[0]["max_tokens"] == 16
    few = jobs(limits={"max_tokens": 8}, sampling={"max_tokens": 8})
    assert few.of_completion(CompletionRequest(prompt="a", **given), ["a"]).asked[0]["max_tokens"] == 8


def test_only_what_has_to_wait_counts_as_waiting() -> None:
    eight = chat(("user", "Hello"), n=8)
    assert len(jobs(free=16, limits={"queue": 4}).of_chat(eight).asked) == 8
    assert len(jobs(free=4, limits={"queue": 4}).of_chat(eight).asked) == 8
    with pytest.raises(ApiError, match="Too many requests are waiting"):
        jobs(free=3, limits={"queue": 4}).of_chat(eight)
    with pytest.raises(ApiError, match="Too many requests are waiting"):
        jobs(waiting=4, free=0, limits={"queue": 4}).of_chat(chat(("user", "Hello")))


def test_free_slots_are_those_of_workers_that_are_ready() -> None:
    loading = SimpleNamespace(model="demo", card=None, load=0)
    ready = [
        SimpleNamespace(model=name, card={"num_slots": 4}, load=load) for name, load in (("demo", 1), ("other", 9))
    ]
    pool: Any = SimpleNamespace(workers=[loading, *ready])
    assert (Pool.free_slots(pool, "demo"), Pool.free_slots(pool, "other")) == (3, 0)


def test_a_response_repeats_what_it_was_sent_with() -> None:
    body = ResponsesRequest(input="Hello", instructions="Be brief.", metadata={"run": "7"})  # type: ignore[call-arg]
    sent = response_body(jobs().of_response(body), None)
    assert (sent["instructions"], sent["metadata"]) == ("Be brief.", {"run": "7"})
    plain = response_body(jobs().of_response(ResponsesRequest(input="Hello")), None)
    assert (plain["instructions"], plain["metadata"]) == (None, {})
