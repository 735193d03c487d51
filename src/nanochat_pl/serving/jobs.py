"""A request of the API as requests to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat_pl.serving.answers import Answer
from nanochat_pl.serving.errors import ApiError
from nanochat_pl.serving.pool import Generation, Pool
from nanochat_pl.serving.requests import (
    MAX_TOKENS_OF_COMPLETION,
    ChatRequest,
    CompletionRequest,
    Message,
    ResponsesRequest,
    Shared,
    asked_of,
    conversation_of,
    require_known,
    stops_of,
    with_seed,
)
from nanochat_pl.serving.settings import ServeSettings


@dataclass
class Job:
    """What has to be generated for a request.

    Attributes:
        answer: what its objects have in common.
        asked: of each choice.
        seconds: that it may take.
        logprobs: whether they are sent.
        details: whether all tokens are sent.
        echo: of completions the prompts' texts, which stand before the answers.
        repeated: fields of the request that stand in the response as they were sent.
    """

    answer: Answer
    asked: list[dict[str, Any]]
    seconds: float
    pool: Pool
    logprobs: bool = False
    details: bool = False
    echo: tuple[str, ...] = ()
    choices_per_prompt: int = 1
    repeated: dict[str, Any] = field(default_factory=dict)

    def start(self) -> list[Generation]:
        """Give all of it to the workers. Raises :class:`ApiError`."""
        return [self.pool.submit(self.answer.model, each) for each in self.asked]


class Jobs:
    """Makes them, within the limits.

    Args:
        pool: who works.
        settings: of the server.
    """

    def __init__(self, pool: Pool, settings: ServeSettings) -> None:
        self._pool, self._settings = pool, settings

    def of_chat(self, body: ChatRequest) -> Job:
        """Raises :class:`ApiError`."""
        require_known(body)
        limits = self._settings.limits
        if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
            raise ApiError(400, "max_completion_tokens: says another number than max_tokens; give one.", "max_tokens")
        if body.top_logprobs and not body.logprobs and not body.return_token_details:
            raise ApiError(400, "top_logprobs: needs logprobs=true.", "top_logprobs")
        max_tokens = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        asked = asked_of(body, max_tokens, self._settings.sampling, limits)
        asked |= {
            "messages": conversation_of(body.messages, limits),
            "answer_ids": body.answer_ids or [],
            "stop": stops_of(body.stop),
            "logprobs": bool(body.logprobs),
            "top_logprobs": body.top_logprobs or 0,
        }
        return self._job(body, asked, body.n or 1, "chatcmpl", bool(body.logprobs))

    def of_completion(self, body: CompletionRequest, prompts: Sequence[str | list[int]]) -> Job:
        """Raises :class:`ApiError`."""
        require_known(body)
        limits = self._settings.limits
        usual = min(MAX_TOKENS_OF_COMPLETION, limits.max_tokens)
        asked = asked_of(body, "max_tokens", self._settings.sampling, limits, usual)
        asked |= {
            "stop": stops_of(body.stop),
            "logprobs": body.logprobs is not None,
            "top_logprobs": body.logprobs or 0,
        }
        for prompt in prompts:
            if isinstance(prompt, str) and len(prompt) > limits.total_chars:
                raise ApiError(400, f"prompt: more than the {limits.total_chars:,} characters allowed.", "prompt")
        if body.echo and not all(isinstance(prompt, str) for prompt in prompts):
            raise ApiError(400, "echo: needs prompts that are texts.", "echo")
        count = body.n or 1
        job = self._job(body, asked, count * len(prompts), "cmpl", body.logprobs is not None)
        job.choices_per_prompt = count
        job.asked = [{**each, "prompt": prompts[i // count]} for i, each in enumerate(job.asked)]
        job.echo = tuple(str(prompts[i // count]) for i in range(len(job.asked))) if body.echo else ()
        return job

    def of_response(self, body: ResponsesRequest) -> Job:
        """Raises :class:`ApiError`."""
        extra = {"conversation", "previous_response_id", "include", "text", "reasoning", "max_tool_calls", "prompt"}
        for name in extra & {*(body.model_extra or {})}:
            value = (body.model_extra or {})[name]
            if value in (None, [], {}, {"format": {"type": "text"}}):
                del (body.model_extra or {})[name]
            else:
                stored = name in ("conversation", "previous_response_id", "prompt")
                why = "nothing is stored here" if stored else "models here have nothing of the kind"
                raise ApiError(400, f"{name}: is not supported; {why}.", name, "unsupported_parameter")
        require_known(body)
        limits = self._settings.limits
        messages = [Message(role="user", content=body.input)] if isinstance(body.input, str) else list(body.input)
        if not messages:
            raise ApiError(400, "input: is empty.", "input")
        asked = asked_of(body, "max_output_tokens", self._settings.sampling, limits)
        asked["messages"] = conversation_of(messages, limits, "input")
        if body.instructions:
            if asked["messages"][0]["role"] == "system":
                raise ApiError(400, "instructions: input has a system message already; give one.", "instructions")
            if len(body.instructions) > limits.message_chars:
                raise ApiError(
                    400,
                    f"instructions: more than the {limits.message_chars:,} characters allowed.",
                    "instructions",
                )
            asked["messages"].insert(0, {"role": "system", "content": body.instructions})
        job = self._job(body, asked, 1, "resp", False)
        job.repeated = {
            "instructions": body.instructions,
            "metadata": (body.model_extra or {}).get("metadata") or {},
        }
        return job

    def _job(self, body: Shared, asked: dict[str, Any], count: int, prefix: str, logprobs: bool) -> Job:
        limits, models = self._settings.limits, self._pool.models
        if count > limits.choices:
            raise ApiError(400, f"n={count}: at most {limits.choices} answers to a request are allowed.", "n")
        name = body.model or next(iter(models))
        if name not in models:
            raise ApiError(
                404,
                f"model={name!r}: there is no such model; there is {', '.join(models)}.",
                "model",
                "model_not_found",
            )
        if self._pool.num_waiting + max(0, count - self._pool.free_slots(name)) > limits.queue:
            raise ApiError(429, "Too many requests are waiting; try again.", code="overloaded", retry_after=2)
        answer = Answer(name, models[name].get("weights", ""), asked["sampling"]["seed"], prefix)
        choices = [with_seed(asked, number) for number in range(count)]
        return Job(answer, choices, limits.request_seconds, self._pool, logprobs, bool(body.return_token_details))
