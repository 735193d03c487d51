"""The requests of the API: what is taken, what is taken without effect, and what the engine is asked for it.

Fields that are named nowhere here are refused. Source of names and bounds: OpenAI's description of its API (2.3.0);
those of vLLM for what that lacks.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from nanochat_pl.engine.sampling import seed_of
from nanochat_pl.serving.errors import ApiError
from nanochat_pl.serving.settings import MAX_MESSAGES, Limits, SamplingDefaults

MAX_STOPS = 4
MAX_TOKENS_OF_COMPLETION = 16  # where a request says nothing, as in the OpenAI API
T = TypeVar("T")
# A body of many wrong items must not become as many errors, which hold up the whole server while they are made.
Items = Annotated[list[T], Field(fail_fast=True)]
FewItems = Annotated[list[T], Field(fail_fast=True, max_length=1000)]

# Taken, and without effect: what clients send by default and a small model has nothing of.
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
    "reasoning_effort",
    "verbosity",
    "include_obfuscation",
    "prediction",
    "truncation",
    "background",
)
# Taken where they say what is done anyway.
ONLY: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
}


class Shared(BaseModel):
    """What all requests have."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str = Field("", description="A name of /v1/models; empty: the first.")
    stream: bool | None = Field(None, description="Whether the answer is sent while it is generated.")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    top_k: int | None = Field(None, ge=-1, description="Only the k most likely tokens can be drawn; 0 or -1: all.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    ignore_eos: bool | None = Field(None, description="Go on to the length that was asked for.")
    stop_token_ids: Items[int] | None = Field(None, max_length=64)
    use_tools: bool | None = Field(None, description="Whether the calculator answers the model's expressions.")
    return_token_details: bool | None = Field(None, description="Send every token, also those of tools.")


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="allow", strict=True)
    include_usage: bool | None = Field(None, description="Whether a last chunk has the usage.")


class TextPart(BaseModel):
    """A part of a message. Other kinds of parts are refused by their type."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["text", "input_text", "output_text", "refusal"] = "text"
    text: str = ""
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: str | FewItems[TextPart] | None = None
    name: str | None = None


class ChatRequest(Shared):
    """Body of POST /v1/chat/completions."""

    messages: Items[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    stop: str | FewItems[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream_options: StreamOptions | None = None
    answer_ids: Items[int] | None = Field(
        None, max_length=65_536, description="Ids with which the answer begins. Its text has theirs, its tokens not."
    )


class CompletionRequest(Shared):
    """Body of POST /v1/completions."""

    prompt: str | FewItems[str] | Items[int] | FewItems[Items[int]] = Field(min_length=0)
    max_tokens: int | None = Field(None, ge=1, description="null: 16.")
    n: int | None = Field(None, ge=1)
    stop: str | FewItems[str] | None = None
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    stream_options: StreamOptions | None = None


class ResponsesRequest(Shared):
    """Body of POST /v1/responses; nothing is stored."""

    input: str | Annotated[Items[Message], Field(max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)


def require_known(request: Shared) -> None:
    """Refuse fields that would change the answer and cannot be had.

    Raises:
        ApiError: one is not known, or asks for something else than what is done anyway.
    """
    for name, value in (request.model_extra or {}).items():
        if name in IGNORED or value is None:
            continue
        if name in ONLY:
            if value in ONLY[name] or (name == "tools" and (request.model_extra or {}).get("tool_choice") == "none"):
                continue
            fix = "; the calculator runs in the server, use_tools=false switches it off" if "tool" in name else ""
            raise ApiError(400, f"{name}: is not supported by this server{fix}.", name, "unsupported_parameter")
        raise ApiError(400, f"{name}: there is no such field.", name, "unknown_parameter")


def conversation_of(messages: list[Message], limits: Limits, field: str = "messages") -> list[dict[str, Any]]:
    """The messages as the chat format takes them; the developer is the system, parts are joined.

    Args:
        messages: of the request.
        limits: of the server.
        field: of the request that has them, for messages about what is wrong.

    Raises:
        ApiError: a role or a message that cannot be, or more than the limits allow.
    """
    if len(messages) > limits.messages:
        raise ApiError(400, f"{field}: {len(messages):,} are more than the {limits.messages:,} allowed.", field)
    found: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        where = f"{field}[{index}]"
        if message.role not in ("system", "developer", "user", "assistant"):
            raise ApiError(
                400, f"{where}.role: {message.role!r} is not one of system, user, assistant.", f"{where}.role"
            )
        if message.content is None and message.role != "assistant":  # which may have said nothing
            raise ApiError(400, f"{where}.content: is missing.", f"{where}.content")
        text = _text_of(message.content)
        if len(text) > limits.message_chars and message.role != "assistant":  # its answers may be longer
            raise ApiError(
                400,
                f"{where}: {len(text):,} characters are more than the {limits.message_chars:,} allowed.",
                f"{where}.content",
            )
        role = "system" if message.role == "developer" else message.role
        tools = (message.model_extra or {}).get("nanochat")
        content: Any = text
        if role == "assistant" and isinstance(tools, dict) and isinstance(tools.get("parts"), list):
            content = tools["parts"]  # as it was generated, with the calls in their places
        found.append({"role": role, "content": content})
    if sum(len(str(each["content"])) for each in found) > limits.total_chars:
        raise ApiError(400, f"{field}: more than the {limits.total_chars:,} characters allowed in all.", field)
    if found[-1]["role"] != "user":
        raise ApiError(400, f"{field}: the last one must be the user's.", field)
    return found


def _text_of(content: str | list[TextPart] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


def stops_of(stop: str | list[str] | None) -> list[str]:
    """The stop texts. Raises :class:`ApiError`."""
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MAX_STOPS:
        raise ApiError(400, f"stop: {len(stops)} texts; at most {MAX_STOPS} are allowed.", "stop")
    if not all(stops):
        raise ApiError(400, "stop: an empty text would end every answer.", "stop")
    return stops


def asked_of(
    request: Shared, max_tokens: str, defaults: SamplingDefaults, limits: Limits, usual: int | None = None
) -> dict[str, Any]:
    """What the engine is asked for, without the prompt: see :func:`nanochat_pl.serving.worker.request_of`.

    Args:
        request: of the API.
        max_tokens: its field that says how many.
        defaults: what holds where it says nothing.
        limits: of the server.
        usual: new tokens where the request says nothing; None: the server's default.

    Raises:
        ApiError: a value that is beyond the limits.
    """
    asked = _given(getattr(request, max_tokens), usual or defaults.max_tokens)
    if asked > limits.max_tokens:
        raise ApiError(400, f"{max_tokens}={asked}: at most {limits.max_tokens:,} are allowed.", max_tokens)
    temperature = _given(request.temperature, defaults.temperature)
    if temperature > limits.temperature:
        raise ApiError(400, f"temperature={temperature}: at most {limits.temperature} is allowed.", "temperature")
    top_k = max(0, _given(request.top_k, defaults.top_k))
    if top_k > limits.top_k:
        raise ApiError(400, f"top_k={top_k}: at most {limits.top_k} is allowed; 0 is all tokens.", "top_k")
    return {
        "max_tokens": asked,
        "sampling": {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": _given(request.top_p, defaults.top_p),
            "min_p": _given(request.min_p, defaults.min_p),
            "repetition_penalty": _given(request.repetition_penalty, 1.0),
            "seed": secrets.randbits(53) if request.seed is None else request.seed,
        },
        "ignore_eos": bool(request.ignore_eos),
        "stop_ids": request.stop_token_ids or [],
        "tools": request.use_tools is not False,
        "stream": bool(request.stream),
        "details": bool(request.return_token_details),
    }


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def with_seed(asked: dict[str, Any], number: int) -> dict[str, Any]:
    """The same for choice ``number`` of several: each has a seed of its own, the first the one that was given."""
    if number == 0:
        return asked
    return {**asked, "sampling": {**asked["sampling"], "seed": seed_of(asked["sampling"]["seed"], number)}}
