"""The objects that the API answers with, whole and in pieces, made of a worker's updates."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat_pl.serving.errors import ApiError, json_of
from nanochat_pl.serving.metrics import Metrics
from nanochat_pl.serving.pool import Generation, Updates

PING_SECONDS = 10.0  # of silence, after which a comment keeps a connection open
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length"}


@dataclass
class Choice:
    """One of the answers to a request, as far as it is there."""

    index: int
    texts: list[str] = field(default_factory=list)
    num_chars: int = 0
    tools: list[dict[str, str]] = field(default_factory=list)
    tokens: list[dict[str, Any]] = field(default_factory=list)
    parts: list[dict[str, str]] = field(default_factory=list)
    finish: str | None = None  # as the engine has it, which knows a full context from a limit of the request
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, update: Mapping[str, Any]) -> None:
        """Take an update in."""
        if text := update.get("text"):
            self.texts.append(text)
            self.num_chars += len(text)
        self.tools += update.get("tools", [])
        self.tokens += update.get("tokens", [])
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "parts", "finish"):
            if name in update:
                setattr(self, name, update[name])

    @property
    def finish_reason(self) -> str | None:
        """As the API has it; None before the end."""
        return None if self.finish is None else FINISH_REASONS.get(self.finish, "stop")

    @property
    def text(self) -> str:
        """All of it so far. It is put together here: a long text that grew by each piece would be copied as often."""
        return "".join(self.texts)


@dataclass
class Answer:
    """What is common to the objects of one request.

    Attributes:
        model: its name.
        fingerprint: of its weights.
        seed: of the first choice: with the same request it gives the same answer.
        prefix: of the id.
    """

    model: str
    fingerprint: str
    seed: int
    prefix: str = "chatcmpl"

    def __post_init__(self) -> None:
        self.id, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that every object has."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def usage_of(choices: Sequence[Choice]) -> dict[str, Any]:
    """The count of tokens; of several answers to one prompt it is counted once."""
    prompt, completion = max(each.prompt_tokens for each in choices), sum(each.completion_tokens for each in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": min(each.cached_tokens for each in choices)},
    }


async def updates_of(
    generations: Sequence[Generation], seconds: float, metrics: Metrics
) -> AsyncGenerator[tuple[int, dict[str, Any]] | None]:
    """The updates of several requests as they come, each with its number; None after a while without any.

    Where nobody reads on, all are cancelled.

    Raises:
        ApiError: one was refused, its worker died, or it takes longer than ``seconds``.
    """
    merged = Updates()
    for number, generation in enumerate(generations):
        generation.deliver_to(merged, number)
    unfinished, ends_at = len(generations), time.monotonic() + seconds
    try:
        while unfinished:
            wait = min(PING_SECONDS, ends_at - time.monotonic())
            if wait <= 0:
                raise ApiError(408, f"The answer took longer than the {seconds:g} seconds allowed.", code="timeout")
            await merged.wait(wait)
            if (found := merged.take()) is None:
                yield None
                continue
            number, update = found
            if "error" in update:
                raise ApiError(**update["error"])
            metrics.observe(generations[number], update)
            unfinished -= "finish" in update
            yield found
    finally:
        for generation in generations:
            generation.cancel()
            metrics.forget(generation)


async def collected(generations: Sequence[Generation], seconds: float, metrics: Metrics) -> list[Choice]:
    """The whole answers. Raises :class:`ApiError`."""
    choices = [Choice(number) for number in range(len(generations))]
    async for found in updates_of(generations, seconds, metrics):
        if found is not None:
            choices[found[0]].add(found[1])
    return choices


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """An event of a stream."""
    head = f"event: {name}\n" if name else ""
    return b"%sdata: %s\n\n" % (head.encode(), json_of(data))


def chat_logprobs(tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Log-probabilities of the tokens of the text, in the form of chat completions."""

    def described(token: Mapping[str, Any]) -> dict[str, Any]:
        return {"token": token_text(token), "logprob": token["logprob"], "bytes": token["bytes"]}

    content = [
        described(token) | {"top_logprobs": [described(each) for each in token.get("top", ())]}
        for token in tokens
        if token["visible"]
    ]
    return {"content": content, "refusal": None}


def token_text(token: Mapping[str, Any]) -> str:
    """A token for people: half a character is U+FFFD."""
    return str(token.get("special") or bytes(token["bytes"]).decode("utf-8", errors="replace"))


def completion_logprobs(tokens: Sequence[Mapping[str, Any]], offset: int) -> dict[str, Any]:
    """Log-probabilities in the form of completions; ``offset``: characters of text before them."""
    visible = [token for token in tokens if token["visible"]]
    texts, offsets = [token_text(token) for token in visible], []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [token["logprob"] for token in visible],
        "top_logprobs": [{token_text(each): each["logprob"] for each in token.get("top", ())} for token in visible],
        "text_offset": offsets,
    }


def own_field(choice: Choice | Mapping[str, Any], details: bool) -> dict[str, Any]:
    """The field ``nanochat`` of a message or a delta: what the calculator did, that the context is full, and all tokens
    where asked for.
    """
    update = vars(choice) if isinstance(choice, Choice) else choice
    found = {name: update[name] for name in ("tools", "parts") if update.get(name)}
    if update.get("finish") == "context":
        found["finish"] = "context"
    if details and update.get("tokens"):
        found["tokens"] = [token | {"text": token_text(token)} for token in update["tokens"]]
        for token in found["tokens"]:
            token["top"] = [each | {"text": token_text(each)} for each in token.get("top", ())]
    return {"nanochat": found} if found else {}
