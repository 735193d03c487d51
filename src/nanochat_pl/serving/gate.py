"""What every request has to pass before it is read: host, key, rate, type, size; and the headers of all responses."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders

from nanochat_pl.serving.errors import ApiError, Json
from nanochat_pl.serving.settings import LOCAL_HOSTS, ServeSettings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PUBLIC = ("/health", "/", "/static/", "/openapi.json")  # no key is asked for these
BODIES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/feedback")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types dompurify",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Gate:
    """Middleware around the whole app.

    Args:
        app: what is behind it.
        settings: of the server.
        keys: API keys; with none, none is asked for.
    """

    def __init__(self, app: App, settings: ServeSettings, keys: Sequence[str]) -> None:
        self._app, self._settings = app, settings
        self._keys = [key.encode("utf-8", "surrogateescape") for key in keys]
        self._recent: dict[str, deque[float]] = defaultdict(deque)
        self._open = 0
        names = {name.lower() for name in (*LOCAL_HOSTS, settings.host, *settings.allowed_hosts)}
        # A page of elsewhere can make its name point here: with a key it gains nothing by that.
        self._hosts = names if settings.is_local or settings.allowed_hosts else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with what is wrong."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, request_id = False, secrets.token_hex(8)
        limits = self._settings.limits
        body = _Body(receive, limits.body_bytes, limits.idle_seconds)

        async def send_with_headers(message: Message) -> None:
            nonlocal began
            if body.refusal is not None and not began:
                return  # what was read of it makes no sense to what is behind
            if message["type"] == "http.response.start":
                began = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                # The page's files may be kept, and are asked about each time.
                is_file = scope["path"].startswith("/static/")
                headers.setdefault("Cache-Control", "no-cache" if is_file else "no-store")
            await send(message)

        try:
            work = scope["path"] in BODIES and scope["method"] == "POST"
            self._check(scope, work)
            self._open += work
            try:
                await self._app(scope, body.receive, send_with_headers)
            finally:
                self._open -= work
            if body.refusal is not None and not began:
                refusal, body.refusal = body.refusal, None
                raise refusal
        except ApiError as error:
            if began:
                raise
            await Json(error.body(), error.status, error.headers())(scope, receive, send_with_headers)
        except asyncio.CancelledError:  # the server stops, and the time that it had for that is over
            if not began:
                stopping = ApiError(503, "The server is shutting down.", code="shutting_down")
                await Json(stopping.body(), stopping.status)(scope, receive, send_with_headers)

    def _check(self, scope: Scope, work: bool) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        host = _name_of(headers.get("host", ""))
        if self._hosts is not None and host not in self._hosts:
            raise ApiError(421, f"Host {host!r}: this server is not called by that name (allowed_hosts).")
        # A browser asks without a key what it may do.
        is_public = any(
            path == each or (each.endswith("/") and len(each) > 1 and path.startswith(each)) for each in PUBLIC
        )
        key = "" if is_public or scope["method"] == "OPTIONS" else self._key_of(headers)
        if work:
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise ApiError(415, "Content-Type: must be application/json.")
            length = headers.get("content-length", "0")
            if length.isdecimal() and int(length) > self._settings.limits.body_bytes:
                raise too_large(self._settings.limits.body_bytes)
            self._require_room(scope, key)

    def _key_of(self, headers: Mapping[str, str]) -> str:
        """The API key of a request, by its place among them: empty where none is asked for."""
        if not self._keys:
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # All are compared, in a time that says nothing of how much of one was right. Headers are read as Latin-1: the
        # bytes that the client sent.
        right = [hmac.compare_digest(given.strip().encode("latin-1"), key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(right):
            raise ApiError(401, "The API key is missing or wrong: Authorization: Bearer KEY.", code="invalid_api_key")
        return str(right.index(True))

    def _require_room(self, scope: Scope, key: str) -> None:
        limits = self._settings.limits
        if self._open >= limits.streams:
            raise ApiError(
                429, f"{limits.streams} requests are open already; try again.", code="overloaded", retry_after=2
            )
        if not limits.requests_per_minute:
            return
        client = scope.get("client") or ("", 0)
        name = key or str(client[0])
        now, recent = time.monotonic(), self._recent[name]
        while recent and recent[0] < now - 60:
            recent.popleft()
        if len(recent) >= limits.requests_per_minute:
            wait = int(61 - (now - recent[0]))
            raise ApiError(
                429, f"More than {limits.requests_per_minute} requests a minute.", code="rate_limited", retry_after=wait
            )
        recent.append(now)
        if len(self._recent) > 10_000:  # addresses that came once
            self._recent = defaultdict(
                deque, {key: times for key, times in self._recent.items() if times[-1] > now - 60}
            )


def too_large(most: int) -> ApiError:
    """Of a body with more bytes than that."""
    return ApiError(413, f"The request has more than the {most:,} bytes allowed (limits.body_bytes).")


class _Body:
    """A request's body, which ends where it is too large or takes too long: what a client says of its length proves
    nothing, and one that sends nothing more would keep its place for ever.

    Attributes:
        refusal: why it was ended.
    """

    def __init__(self, receive: Receive, most: int, seconds: float) -> None:
        self._receive, self._most, self._seconds = receive, most, seconds
        self._num_bytes, self._ends_at, self._is_whole = 0, time.monotonic() + seconds, False
        self.refusal: ApiError | None = None

    async def receive(self) -> Message:
        if self._is_whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._ends_at - time.monotonic())
        except TimeoutError:
            return self._end(ApiError(408, f"The request did not arrive within {self._seconds:g} seconds."))
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._most:
            return self._end(too_large(self._most))
        self._is_whole = not message.get("more_body", False)
        return message

    def _end(self, refusal: ApiError) -> Message:
        self.refusal, self._is_whole = refusal, True
        return {"type": "http.disconnect"}


def _name_of(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
