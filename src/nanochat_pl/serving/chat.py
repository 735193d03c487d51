"""Chat completions: the object, and the chunks of a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from nanochat_pl.serving.answers import (
    DONE,
    PING,
    Choice,
    chat_logprobs,
    event,
    own_field,
    updates_of,
    usage_of,
)
from nanochat_pl.serving.errors import ApiError
from nanochat_pl.serving.jobs import Job
from nanochat_pl.serving.metrics import Metrics


def chat_body(job: Job, choices: Sequence[Choice]) -> dict[str, Any]:
    """The object ``chat.completion``."""
    return {
        **job.answer.head("chat.completion"),
        "choices": [
            {
                "index": choice.index,
                "message": {
                    "role": "assistant",
                    "content": choice.text,
                    "refusal": None,
                    **own_field(choice, job.details),
                },
                "logprobs": chat_logprobs(choice.tokens) if job.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ],
        "usage": usage_of(choices),
        "nanochat": {"seed": job.answer.seed},
    }


async def chat_stream(job: Job, metrics: Metrics, include_usage: bool) -> AsyncGenerator[bytes]:
    """The chunks of a stream, as events. Several choices interleave.

    Raises:
        ApiError: it is refused, before the first chunk. A fault behind that is an event, and the end.
    """
    choices = [Choice(number) for number in range(len(job.asked))]
    head = job.answer.head("chat.completion.chunk") | ({"usage": None} if include_usage else {})

    def chunk(index: int, delta: Mapping[str, Any], finish: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event(head | {"choices": [choice]})

    began, unfinished = False, len(choices)
    chunks: list[bytes] = []  # to be sent together: each that is sent by itself costs more than it takes to write
    updates = updates_of(job.start(), job.seconds, metrics)
    try:
        async for found in updates:
            if not began:
                began = True
                chunks += [chunk(choice.index, {"role": "assistant", "content": ""}) for choice in choices]
            if found is None:
                yield b"".join([*chunks, PING])
                chunks = []
                continue
            index, update = found
            choices[index].add(update)
            own = own_field(update, job.details)
            if update.get("text") or own:
                logprobs = chat_logprobs(update.get("tokens", ())) if job.logprobs else None
                chunks.append(chunk(index, {"content": update.get("text", ""), **own}, logprobs=logprobs))
            if "finish" in update:
                chunks.append(chunk(index, {}, choices[index].finish_reason))
                unfinished -= 1
            if chunks and unfinished:
                yield b"".join(chunks)
                chunks = []
        if include_usage:
            usage = {"usage": usage_of(choices), "nanochat": {"seed": job.answer.seed}}
            chunks.append(event(head | {"choices": []} | usage))
        yield b"".join([*chunks, DONE])
    except ApiError as error:
        if not began:
            raise
        yield b"".join([*chunks, event(error.body())])
    finally:
        await updates.aclose()
