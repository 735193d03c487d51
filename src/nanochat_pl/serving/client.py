"""A conversation with a model on a server, for the chat in the terminal."""

from __future__ import annotations

import http.client
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.engine.events import Event, EventKind
from nanochat_pl.serving.settings import KEY_VARIABLE

TIMEOUT = 600.0  # seconds without a word of the server, or until its model is loaded
SECONDS_BETWEEN_TRIES = 2.0  # while it is being loaded


class RemoteSession:
    """As :class:`~nanochat_pl.engine.session.Session`: the server keeps nothing, so all of it is sent each time.

    Args:
        url: of the server, with or without /v1.
        model: its name there; None: the first.
        system: the system prompt, empty for none.
        key: API key; None: none.

    Attributes:
        system: the system prompt; a new one holds from the next conversation on.
        max_context: most tokens of a conversation.
        num_dropped: turns that were dropped: none, the server refuses what is too long.

    Raises:
        UserError: nobody answers there, or has no such model.
    """

    num_dropped = 0

    def __init__(self, url: str, model: str | None = None, system: str = "", key: str | None = None) -> None:
        self._base = url.rstrip("/").removesuffix("/v1")
        if not self._base.startswith(("http://", "https://")):
            raise UserError(f"url={url}: must begin with http:// or https://.")
        self._key = key
        self.system = system
        with self._open("/v1/models") as response:
            try:
                models = {each["id"]: each for each in json.load(response)["data"]}
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"url={url}: what answers there is no server of the OpenAI API.", "nanochat-pl serve starts one."
                ) from None
        if not models:
            raise UserError(f"url={url}: the server has no models.", "Name one that has: nanochat-pl serve run=NAME.")
        if model is not None and model not in models:
            raise UserError(f"model={model}: {self._base} has {', '.join(models)}.")
        self.model = model or next(iter(models))
        self.max_context = int(models[self.model].get("max_model_len") or 0)
        self.clear()

    def clear(self) -> None:
        """Begin a new conversation."""
        self._messages: list[dict[str, Any]] = []
        self._stop_requested = False

    def stop(self) -> None:
        """End the answer. May be called from a signal handler."""
        self._stop_requested = True

    def send(self, message: str, **settings: Any) -> Iterator[Event]:
        """Add a message, and give the answer as events, the last of them "finished"; settings as the API names them.

        Raises:
            UserError: the server refuses it, or cannot be reached any more; the conversation is as before.
        """
        asked = [*self._messages, {"role": "user", "content": message}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        settings["top_k"] = settings.get("top_k") or 0  # to the server, null is its own default
        body = {"model": self.model, "messages": [*system, *asked], "stream": True, **settings}
        self._stop_requested = False
        return self._read(self._open("/v1/chat/completions", body), asked)

    def _read(self, response: http.client.HTTPResponse, asked: list[dict[str, Any]]) -> Iterator[Event]:
        text, reason, full = "", "cancelled", ""
        parts: list[dict[str, str]] = []
        try:
            with response:
                for chunk in _chunks(response):
                    if "error" in chunk:
                        raise UserError(f"{self._base}: {chunk['error']['message']}")
                    for choice in chunk.get("choices", ()):
                        delta = choice.get("delta", {})
                        own = delta.get("nanochat", {})
                        for tool in own.get("tools", ()):
                            yield Event(_kind(tool), tool["text"])
                        if piece := delta.get("content"):
                            text += piece
                            yield Event("text", piece)
                        parts = own.get("parts", parts)
                        full = own.get("finish") or full
                        reason = choice.get("finish_reason") or reason
                    if self._stop_requested:
                        break
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{self._base}: the connection broke: {error}.") from error
        finally:
            answer: dict[str, Any] = {"role": "assistant", "content": text}
            self._messages = [*asked, answer | ({"nanochat": {"parts": parts}} if parts else {})]
        yield Event("finished", "cancelled" if self._stop_requested else full or reason)

    def _open(self, path: str, body: Mapping[str, Any] | None = None) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = None if body is None else json.dumps(body).encode("utf-8", "replace")
        request = urllib.request.Request(self._base + path, data, headers)
        deadline, is_waiting = time.monotonic() + TIMEOUT, False
        while True:
            try:
                response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
                return response
            except urllib.error.HTTPError as error:
                message, code = _told(error)
                if code != "not_ready" or time.monotonic() > deadline:
                    fix = f"Set {KEY_VARIABLE} to one that the server has." if error.code == 401 else ""
                    raise UserError(f"{self._base}: {message}", fix) from error
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                raise UserError(
                    f"url={self._base}: nobody answers there: {reason}.", fix="Start one: nanochat-pl serve run=NAME"
                ) from error
            if not is_waiting:
                is_waiting = True
                print(f"{self._base}: the model is being loaded; waiting for it …", file=sys.stderr)
            time.sleep(SECONDS_BETWEEN_TRIES)


def _kind(tool: Mapping[str, str]) -> EventKind:
    return "tool_result" if tool["type"] == "tool_result" else "tool_call"


def _chunks(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        data = line.decode("utf-8", "replace").strip().removeprefix("data:").strip()
        if data == "[DONE]":
            return
        if data.startswith("{"):
            yield json.loads(data)


def _told(error: urllib.error.HTTPError) -> tuple[str, str | None]:
    """Message and code of a refusal."""
    try:
        told = json.load(error)["error"]
        return str(told["message"]), told.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{error.code} {error.reason}", None
