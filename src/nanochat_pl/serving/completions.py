"""Completions of a text: the object, and the pieces of a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from nanochat_pl.serving.answers import (
    DONE,
    PING,
    Choice,
    completion_logprobs,
    event,
    updates_of,
    usage_of,
)
from nanochat_pl.serving.errors import ApiError
from nanochat_pl.serving.jobs import Job
from nanochat_pl.serving.metrics import Metrics
from nanochat_pl.serving.requests import CompletionRequest


def prompts_of(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a request: texts, or ids.

    Raises:
        ApiError: there is none.
    """
    prompt: Any = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not prompt or any(each == [] for each in prompt):
        raise ApiError(400, "prompt: is empty.", "prompt")
    return list(prompt)


def completion_body(job: Job, choices: Sequence[Choice]) -> dict[str, Any]:
    """The object ``text_completion``."""
    return {
        **job.answer.head("text_completion"),
        "choices": [
            {
                "index": choice.index,
                "text": _echo(job, choice.index) + choice.text,
                "logprobs": completion_logprobs(choice.tokens, len(_echo(job, choice.index))) if job.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ],
        "usage": _usage(job, choices),
        "nanochat": {"seed": job.answer.seed},
    }


async def completion_stream(job: Job, metrics: Metrics, include_usage: bool) -> AsyncGenerator[bytes]:
    """The pieces of a stream, as events.

    Raises:
        ApiError: it is refused, before the first piece. A fault behind that is an event, and the end.
    """
    choices = [Choice(number) for number in range(len(job.asked))]
    head = job.answer.head("text_completion") | ({"usage": None} if include_usage else {})
    began, updates = False, updates_of(job.start(), job.seconds, metrics)
    try:
        async for found in updates:
            began = True
            if found is None:
                yield PING
                continue
            index, update = found
            choice = choices[index]
            before = len(_echo(job, index)) + choice.num_chars
            text = update.get("text", "")
            if not choice.prompt_tokens and "prompt_tokens" in update:
                text = _echo(job, index) + text
            choice.add(update)
            if text or "finish" in update:
                logprobs = completion_logprobs(update.get("tokens", ()), before) if job.logprobs else None
                piece = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}
                yield event(head | {"choices": [piece]})
        if include_usage:
            yield event(head | {"choices": [], "usage": _usage(job, choices)})
        yield DONE
    except ApiError as error:
        if not began:
            raise
        yield event(error.body())
    finally:
        await updates.aclose()


def _echo(job: Job, index: int) -> str:
    return job.echo[index] if job.echo else ""


def _usage(job: Job, choices: Sequence[Choice]) -> dict[str, Any]:
    """The tokens of all prompts and answers."""
    each = job.choices_per_prompt
    by_prompt = [usage_of(choices[i : i + each]) for i in range(0, len(choices), each)]
    usage = {key: sum(part[key] for part in by_prompt) for key in by_prompt[0] if key != "prompt_tokens_details"}
    cached = sum(part["prompt_tokens_details"]["cached_tokens"] for part in by_prompt)
    return usage | {"prompt_tokens_details": {"cached_tokens": cached}}
