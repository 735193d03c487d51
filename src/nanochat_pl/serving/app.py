"""The server's routes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from nanochat_pl.common.errors import UserError
from nanochat_pl.serving import schemas
from nanochat_pl.serving.answers import Choice, collected, usage_of
from nanochat_pl.serving.chat import chat_body, chat_stream
from nanochat_pl.serving.completions import completion_body, completion_stream, prompts_of
from nanochat_pl.serving.errors import ApiError, Json
from nanochat_pl.serving.feedback import Feedback, FeedbackRequest
from nanochat_pl.serving.gate import Gate, Send
from nanochat_pl.serving.jobs import Job, Jobs
from nanochat_pl.serving.metrics import Metrics
from nanochat_pl.serving.pool import Pool
from nanochat_pl.serving.requests import ChatRequest, CompletionRequest, ResponsesRequest
from nanochat_pl.serving.responses import response_body, response_stream
from nanochat_pl.serving.settings import ServeSettings

T = TypeVar("T")
PAGE = Path(__file__).parent / "page"


class Server:
    """What the routes share: made when the event loop runs, for it starts the workers."""

    def __init__(self, pool: Pool, settings: ServeSettings) -> None:
        self.pool, self.settings = pool, settings
        self.metrics = Metrics(pool)
        self.jobs = Jobs(pool, settings)
        self.feedback = Feedback(settings.feedback) if settings.feedback else None


def create_app(make_pool: Callable[[], Pool], settings: ServeSettings, keys: Sequence[str] = ()) -> FastAPI:
    """The server as an ASGI app.

    Args:
        make_pool: starts the workers; called in the event loop.
        settings: of the server.
        keys: API keys; with none, none is asked for.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.server = Server(make_pool(), settings)
        try:
            yield
        finally:
            await app.state.server.pool.close()

    app = FastAPI(
        title="nanochat_pl", version="1", lifespan=lifespan, docs_url=None, redoc_url=None, responses=schemas.ERRORS
    )
    _add_routes(app)
    if settings.page:
        app.mount("/static", StaticFiles(directory=PAGE), name="static")
        app.add_api_route("/", _page, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(UserError, _on_user_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    app.add_middleware(Gate, settings=settings, keys=keys)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


def _add_routes(app: FastAPI) -> None:
    app.get("/health", response_model=schemas.Health)(health)
    app.head("/health", include_in_schema=False)(health)
    app.get("/stats", response_model=schemas.Stats)(stats)
    app.get("/metrics", response_class=Response, responses=schemas.PLAIN)(metrics)
    app.get("/info", response_model=schemas.Info)(info)
    app.get("/v1/models", response_model=schemas.ModelList)(models)
    app.get("/v1/models/{name:path}", response_model=schemas.Model)(model)
    app.post("/v1/chat/completions", responses=schemas.answers(schemas.ChatCompletion), response_model=None)(chat)
    app.post("/v1/completions", responses=schemas.answers(schemas.TextCompletion), response_model=None)(completions)
    app.post("/v1/responses", responses=schemas.answers(schemas.ResponseObject), response_model=None)(responses)
    app.post("/feedback", response_model=schemas.Taken)(feedback)
    app.api_route("/v1", methods=["GET", "HEAD", "OPTIONS"], include_in_schema=False)(probe)


async def probe() -> dict[str, str]:
    """What tools ask to see whether somebody is there."""
    return {"object": "api"}


async def _page() -> FileResponse:
    return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})


async def health(request: Request) -> Json:
    """Whether every worker is ready and gets on: 503 where one does not."""
    workers = [
        {
            "model": each.model,
            "state": each.state,
            "running": each.load,
            "steps": each.stats.get("steps", 0),
            "seconds_since_sign_of_life": round(each.silent_for, 2),
            "restarts": each.num_restarts,
        }
        for each in _server(request).pool.workers
    ]
    fine = all(each["state"] == "ready" for each in workers)
    return Json({"status": "ok" if fine else "degraded", "workers": workers}, 200 if fine else 503)


async def stats(request: Request) -> dict[str, Any]:
    """Figures of every worker."""
    workers = _server(request).pool.workers
    return {"workers": [{"model": each.model, "state": each.state, **each.stats} for each in workers]}


async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(_server(request).metrics.text(), media_type="text/plain; version=0.0.4")


async def info(request: Request) -> dict[str, Any]:
    """What the page needs: the models with their cards, what holds where a request says nothing, and the limits."""
    server = _server(request)
    return {
        "models": [{"id": name, **card} for name, card in server.pool.models.items()],
        "sampling": vars(server.settings.sampling),
        "limits": vars(server.settings.limits),
        "feedback": server.feedback is not None,
    }


async def models(request: Request) -> dict[str, Any]:
    """The models that are served."""
    found = _server(request).pool.models.items()
    return {"object": "list", "data": [_model(name, card) for name, card in found]}


async def model(name: str, request: Request) -> dict[str, Any]:
    """One of them."""
    cards = _server(request).pool.models
    if name not in cards:
        raise ApiError(404, f"model={name!r}: there is no such model.", "model", "model_not_found")
    return _model(name, cards[name])


def _model(name: str, card: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": card.get("created", 0),  # 0: it is not loaded yet
        "owned_by": "nanochat_pl",
        "max_model_len": card.get("max_context"),
    }


async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer the last message of a conversation."""
    server = _server(request)
    job = server.jobs.of_chat(body)
    if body.stream:
        return await _stream(request, chat_stream(job, server.metrics, _with_usage(body)))
    return Json(chat_body(job, await _whole(request, job, server)))


async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue a text."""
    server = _server(request)
    job = server.jobs.of_completion(body, prompts_of(body))
    if body.stream:
        return await _stream(request, completion_stream(job, server.metrics, _with_usage(body)))
    return Json(completion_body(job, await _whole(request, job, server)))


async def responses(body: ResponsesRequest, request: Request) -> Response:
    """Answer in the form of the responses API. Nothing is stored."""
    server = _server(request)
    job = server.jobs.of_response(body)
    if body.stream:
        return await _stream(request, response_stream(job, server.metrics))
    choices = await _whole(request, job, server)
    return Json(response_body(job, choices[0], usage_of(choices)))


async def feedback(body: FeedbackRequest, request: Request) -> dict[str, bool]:
    """Write a conversation down that somebody liked, or did not."""
    server = _server(request)
    if server.feedback is None:
        raise ApiError(404, "feedback: this server takes none (feedback=PATH).")
    await asyncio.to_thread(server.feedback.write, body)
    return {"taken": True}


async def _whole(request: Request, job: Job, server: Server) -> list[Choice]:
    """The whole answers."""
    return await _unless_left(request, collected(job.start(), job.seconds, server.metrics))


async def _stream(request: Request, pieces: AsyncGenerator[bytes]) -> Response:
    """Pieces as events. What is refused is refused with its status, before the stream begins."""
    first = await _unless_left(request, anext(pieces, b""))

    async def all_pieces() -> AsyncIterator[bytes]:
        try:
            yield first
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()

    return _EventStream(all_pieces(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


class _EventStream(StreamingResponse):
    """A response whose pieces end with it."""

    async def stream_response(self, send: Send) -> None:
        """As starlette has it, which leaves it to the garbage collector to end the generator of the pieces, and so the
        request at its worker, where the client goes while a piece is being sent."""
        try:
            await super().stream_response(send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]


async def _unless_left(request: Request, work: Awaitable[T]) -> T:
    """The result of some work, which ends where the client leaves before it is there."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_until_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "The client has left.")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()


async def _until_disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _with_usage(body: ChatRequest | CompletionRequest) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Json(error.body(), error.status, error.headers())


async def _on_user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    return await _on_api_error(request, ApiError(400, error.in_one_line))


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if found[0]["type"] == "json_invalid":
        reason, place = found[0].get("ctx", {}).get("error", "it cannot be read"), found[0]["loc"][-1]
        return await _on_api_error(request, ApiError(400, f"The body is no JSON: {reason}, at character {place}."))
    if [each["type"] for each in found] == ["missing"] and found[0]["loc"] == ("body",):
        return await _on_api_error(request, ApiError(400, "The body is empty: a JSON object is needed."))
    # Of a value that may have several forms there is an error for each: the one that went deepest means most.
    name, problems = "", dict[str, None]()
    for each in found:
        if not (field := _name_of(each["loc"])).startswith(name):
            continue
        if field != name:
            name, problems = field, {}
        problems[each["msg"]] = None
    said = "; or ".join(problems)
    message = f"{name}: {said}." if name else f"The request is no JSON object of this form: {said}."
    return await _on_api_error(request, ApiError(400, message, name or None))


def _name_of(place: Sequence[str | int]) -> str:
    """A field as ``messages[0].content``, without the names of the forms that it may have."""
    parts = [part for part in place if part not in ("body", "str", "int") and not str(part).startswith("list[")]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.url.path}: {error.detail}."
    if error.status_code == 400:  # FastAPI's: it does not say what
        message = "The body cannot be read: it is no JSON in UTF-8, or nested too deeply, or has a number too long."
    made = ApiError(error.status_code, message)
    return Json(made.body(), made.status, {**made.headers(), **(error.headers or {})})


async def _on_bug(request: Request, error: Exception) -> Response:
    return await _on_api_error(request, ApiError(500, "The server failed; its log says more.", code="internal_error"))
