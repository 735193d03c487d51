"""The responses API, as far as it goes without storing anything: the object, and the typed events of a stream."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from nanochat_pl.serving.answers import PING, Choice, event, own_field, updates_of, usage_of
from nanochat_pl.serving.errors import ApiError
from nanochat_pl.serving.jobs import Job
from nanochat_pl.serving.metrics import Metrics


def response_body(
    job: Job, choice: Choice | None, usage: Mapping[str, Any] | None = None, status: str | None = None, item: str = ""
) -> dict[str, Any]:
    """The object ``response``; without a choice one that has just begun."""
    reason = None
    if choice is not None and status is None:
        status = "completed" if choice.finish_reason == "stop" else "incomplete"
        reason = None if status == "completed" else {"reason": "max_output_tokens"}
    return {
        "id": job.answer.id,
        "object": "response",
        "created_at": job.answer.created,
        "status": status,
        "model": job.answer.model,
        "output": [] if choice is None else [_item(choice, item or _new_item(), str(status))],
        "usage": None if usage is None else _usage(usage),
        "incomplete_details": reason,
        "error": None,
        **job.repeated,
        "parallel_tool_calls": False,
        "temperature": job.asked[0]["sampling"]["temperature"],
        "top_p": job.asked[0]["sampling"]["top_p"],
        "max_output_tokens": job.asked[0]["max_tokens"],
        "tool_choice": "none",
        "tools": [],
    }


async def response_stream(job: Job, metrics: Metrics) -> AsyncGenerator[bytes]:
    """The events of a stream.

    Raises:
        ApiError: it is refused, before the first event. A fault behind that is an event, and the end.
    """
    choice, item, number = Choice(0), _new_item(), 0
    place = {"item_id": item, "output_index": 0, "content_index": 0}

    def named(name: str, **data: Any) -> bytes:
        nonlocal number
        number += 1
        return event({"type": name, **data, "sequence_number": number - 1}, name)

    began, updates = False, updates_of(job.start(), job.seconds, metrics)
    try:
        async for found in updates:
            if not began:
                began = True
                started = response_body(job, None, status="in_progress")
                yield named("response.created", response=started)
                yield named("response.in_progress", response=started)
                empty = {**_item(choice, item, "in_progress"), "content": []}
                yield named("response.output_item.added", output_index=0, item=empty)
                yield named("response.content_part.added", **place, part=_part(""))
            if found is None:
                yield PING
                continue
            choice.add(found[1])
            if text := found[1].get("text"):
                yield named("response.output_text.delta", **place, delta=text, logprobs=[])
        done = response_body(job, choice, usage_of([choice]), item=item)
        yield named("response.output_text.done", **place, text=choice.text, logprobs=[])
        yield named("response.content_part.done", **place, part=_part(choice.text))
        yield named("response.output_item.done", output_index=0, item=done["output"][0])
        yield named(f"response.{done['status']}", response=done)
    except ApiError as error:
        if not began:
            raise
        failed = response_body(job, choice, status="failed", item=item)
        failed["error"] = {"code": error.code or "server_error", "message": error.message}
        yield named("response.failed", response=failed)
    finally:
        await updates.aclose()


def _new_item() -> str:
    return f"msg-{secrets.token_hex(12)}"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item(choice: Choice, item: str, status: str) -> dict[str, Any]:
    return {
        "type": "message",
        "id": item,
        "role": "assistant",
        "status": status if status in ("in_progress", "completed") else "incomplete",
        "content": [_part(choice.text)],
        **own_field(choice, details=False),
    }


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
