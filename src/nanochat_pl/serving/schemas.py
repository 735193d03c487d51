"""What the API answers with, for its OpenAPI description. Clients see the dictionaries themselves."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Object(BaseModel):
    model_config = ConfigDict(extra="allow")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What is wrong."""

    error: ErrorDetail


class Usage(_Object):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(_Object):
    role: str
    content: str | None
    refusal: str | None


class ChatChoice(_Object):
    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: str


class ChatCompletion(_Object):
    """Answers to a conversation."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(_Object):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str


class TextCompletion(_Object):
    """Continuations of texts."""

    id: str
    object: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ResponseObject(_Object):
    """An answer in the form of the responses API."""

    id: str
    object: str
    created_at: int
    model: str
    status: str
    output: list[dict[str, Any]]


class Model(_Object):
    """A model that is served."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(BaseModel):
    """The models that are served."""

    object: str
    data: list[Model]


class WorkerHealth(BaseModel):
    model: str
    state: str
    running: int
    steps: int
    seconds_since_sign_of_life: float
    restarts: int


class Health(BaseModel):
    """Whether the server works."""

    status: str
    workers: list[WorkerHealth]


class Stats(BaseModel):
    """Figures of every worker."""

    workers: list[dict[str, Any]]


class Info(BaseModel):
    """What a page needs to know."""

    models: list[dict[str, Any]]
    sampling: dict[str, Any]
    limits: dict[str, Any]
    feedback: bool


class Taken(BaseModel):
    """That something was written down."""

    taken: bool


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": what}
    for status, what in {
        400: "A field is wrong.",
        401: "The API key is missing or wrong.",
        404: "There is no such model or path.",
        405: "The path has no such method.",
        408: "It took too long.",
        413: "The request is too large.",
        415: "The request is not JSON.",
        421: "The server is not called by this name.",
        422: "Never sent.",
        429: "Too many requests.",
        500: "The server failed.",
        503: "The model is being loaded, or its process has ended.",
    }.items()
}
PLAIN: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


def answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The responses of a route that answers whole or as a stream."""
    return {200: {"model": model, "content": {"text/event-stream": {"schema": {"type": "string"}}}}}
