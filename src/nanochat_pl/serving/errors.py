"""Errors as the API has them: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse

_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
MAX_CHARS = 1000  # of a message: what a client sent may stand in it
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """What a request is refused with, or ended by.

    Attributes:
        status: of HTTP.
        message: for people: what is wrong, and what to do.
        param: the field that it is about.
        code: for programs, as ``context_length_exceeded``.
        retry_after: seconds after which it may be tried again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        message, param = _shortened(message), param and _shortened(param)
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The object that is sent."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that belong to it."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


class Json(JSONResponse):
    """JSON in UTF-8, whatever texts there are in it."""

    def render(self, content: Any) -> bytes:
        """The bytes."""
        return json_of(content)


def json_of(content: Any) -> bytes:
    """JSON in UTF-8; where a text has half a surrogate pair, which UTF-8 cannot hold, with escapes."""
    try:
        return _ENCODE(content).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(content, separators=(",", ":")).encode("ascii")


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"
