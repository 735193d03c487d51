"""The terminal chat's client and servers that are not ready."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.serving import client
from nanochat_pl.serving.errors import ApiError

MODELS = json.dumps({"data": [{"id": "demo", "max_model_len": 64}]})
ANSWER = 'data: {"choices": [{"delta": {"content": "Hello"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
LOADING = ApiError(503, "demo: is being loaded; ask again in some seconds.", code="not_ready", retry_after=3)
ENDED = ApiError(503, "demo: its process has ended and cannot be started again; the server's log says why.")


@contextmanager
def server_that_answers(*answers: str | ApiError, models: str = MODELS) -> Iterator[str]:
    """The address of a server that has these answers to what is posted, one after the other."""
    left = [*answers]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(models)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(left.pop(0))

        def answer(self, with_: str | ApiError) -> None:
            is_error = isinstance(with_, ApiError)
            self.send_response(with_.status if is_error else 200)
            self.end_headers()
            self.wfile.write((json.dumps(with_.body()) if is_error else with_).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
    assert not left, "not all were asked for"


def test_the_chat_waits_while_the_model_is_being_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says so, once."""
    monkeypatch.setattr(client, "SECONDS_BETWEEN_TRIES", 0.0)
    with server_that_answers(LOADING, LOADING, ANSWER) as url:
        events = [*client.RemoteSession(url).send("Hi")]
    assert [(event.kind, event.text) for event in events] == [("text", "Hello"), ("finished", "stop")]
    assert capsys.readouterr().err == f"{url}: the model is being loaded; waiting for it …\n"


def test_it_does_not_wait_for_what_will_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose process has ended; one that is not loaded in time."""
    with server_that_answers(ENDED) as url, pytest.raises(UserError, match="cannot be started again"):
        client.RemoteSession(url).send("Hi")
    monkeypatch.setattr(client, "TIMEOUT", 1.0)
    monkeypatch.setattr(client, "SECONDS_BETWEEN_TRIES", 1.1)
    with server_that_answers(LOADING, LOADING) as url, pytest.raises(UserError, match="is being loaded"):
        client.RemoteSession(url).send("Hi")


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ("<!doctype html><p>a page", "what answers there is no server of the OpenAI API"),
        ('{"data": null}', "what answers there is no server of the OpenAI API"),
        ("[1]", "what answers there is no server of the OpenAI API"),
        ('{"data": []}', "the server has no models"),
    ],
)
def test_what_is_no_server_of_ours(models: str, said: str) -> None:
    with server_that_answers(models=models) as url, pytest.raises(UserError, match=said):
        client.RemoteSession(url)
