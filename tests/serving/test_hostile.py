"""Clients that mean no good: bodies that are costly to refuse, connections that neither send nor read, a full disk.

What is asked for is always the same: an error in OpenAI's form that names the field, nothing that hangs, and /health
answers meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import threading
import time
from typing import Any

import pytest
import uvicorn

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build
from nanochat_pl.serving.app import create_app
from nanochat_pl.serving.gate import Gate
from nanochat_pl.serving.run import GracefulServer, _end_answers, serve, uvicorn_config
from nanochat_pl.serving.settings import ServeSettings
from tests.serving.test_gate import CHAT, ScriptedGeneration, ScriptedPool, client_of, error_of

JSON = {"Content-Type": "application/json"}
MANY = 100_000
USER = [{"role": "user", "content": "hi"}]
IDLE = 0.4


@pytest.mark.parametrize(
    ("body", "says", "param"),
    [
        ("", "The body is empty", None),
        ('{"messages":', "no JSON: Expecting value, at character 12", None),
        (b'{"messages": "\xe9"}', "cannot be read", None),
        ("[" * 5000 + "]" * 5000, "cannot be read", None),
        (json.dumps(CHAT | {"stream": 1}), "stream: ", "stream"),
        (json.dumps(CHAT | {"stream_options": {"include_usage": 1}}), "boolean", "stream_options.include_usage"),
        (json.dumps({"messages": [{}]}), "messages[0].role", "messages[0].role"),
        (json.dumps({"messages": [{"role": "user", "content": 5}]}), "string; or", "messages[0].content"),
        (
            json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
            "'text'",
            "messages[0].content[0].type",
        ),
        (json.dumps(CHAT | {"stop": ["a", None]}), "string", "stop[1]"),
        (json.dumps(CHAT | {"max_completion_tokens": 5000}), "4,096", "max_completion_tokens"),
        (json.dumps(CHAT | {"max_tokens": True}), "integer", "max_tokens"),
        (json.dumps(CHAT | {"temperature": float("nan")}), "temperature", "temperature"),
        (json.dumps(CHAT | {"x" * MANY: 1}), "…", "x" * 999 + "…"),
    ],
)
def test_what_is_wrong_is_said_of_the_field_that_was_sent(body: Any, says: str, param: str | None) -> None:
    with client_of() as client:
        response = client.post("/v1/chat/completions", content=body, headers=JSON)
        status, message = error_of(response)
        assert (status, response.json()["error"]["param"]) == (400, param)
        assert says in message and len(message) <= 1000


def test_fields_of_responses_have_their_own_names() -> None:
    with client_of() as client:
        for body, param in (
            ({"input": "x", "max_output_tokens": 5000}, "max_output_tokens"),
            ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
            ({"input": "x", "instructions": "a" * 9000}, "instructions"),
            ({"input": [{"role": "system", "content": "a"}, *USER], "instructions": "b"}, "instructions"),
        ):
            response = client.post("/v1/responses", json=body)
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("path", "start", "item", "end"),
    [
        ("/v1/chat/completions", '{"messages":[', "0,", "0]}"),
        ("/v1/chat/completions", '{"messages":[{"role":"user","content":[', "{},", "{}]}]}"),
        ("/v1/chat/completions", '{"messages":[{"role":"user","content":"x"}],"stop":[', "null,", "null]}"),
        ("/v1/completions", '{"prompt":[', "0.1,", "0.1]}"),
        ("/v1/completions", '{"prompt":[', "[0.1],", "[]]}"),
        ("/v1/responses", '{"input":[', "{},", "{}]}"),
        ("/feedback", '{"rating":"up","messages":[', "0,", "0]}"),
        ("/feedback", '{"rating":"up","messages":[{"role":"user","content":"a"},{"content":[', "0,", "0]}]}"),
    ],
)
def test_many_wrong_items_cost_what_one_costs(path: str, start: str, item: str, end: str, tmp_path: Any) -> None:
    """An error for each would take seconds, in which no stream gets on."""
    with client_of({"feedback": str(tmp_path / "liked.jsonl")}) as client:
        seconds = []
        for _ in range(3):
            began = time.process_time()
            response = client.post(path, content=start + item * MANY + end, headers=JSON)
            seconds.append(time.process_time() - began)
            assert error_of(response)[0] == 400
            assert len(response.content) < 2000
        assert min(seconds) < 1.5  # 0.05 s on an idle machine; 3 to 12 s with all errors


@pytest.mark.parametrize("stream", [False, True])
def test_half_a_surrogate_pair_comes_back_as_it_was_sent(stream: bool) -> None:
    """UTF-8 cannot hold it; JSON's escapes can."""
    with client_of() as client:
        body = json.dumps({"prompt": "a\ud800", "echo": True, "stream": stream})
        response = client.post("/v1/completions", content=body, headers=JSON)
        assert response.status_code == 200 and b"a\\ud800" in response.content.decode("utf-8").encode()


def test_keys_are_compared_as_bytes_and_counted_once_however_they_are_written() -> None:
    keys = ("first-key-1", "schlüssel-2")
    with client_of({"limits": {"requests_per_minute": 2}}, keys) as client:
        ways = (b"Bearer first-key-1", b"bearer  first-key-1 ", b"BEARER first-key-1")
        found = [client.post("/v1/chat/completions", json=CHAT, headers={"Authorization": way}) for way in ways]
        assert [each.status_code for each in found] == [200, 200, 429]
        other = client.post("/v1/chat/completions", json=CHAT, headers={"Authorization": "Bearer schlüssel-2".encode()})
        assert other.status_code == 200
        for wrong in (b"Bearer \xff\xfe", b"Bearer first-key-1 first-key-1", b"Bearer "):
            assert client.get("/v1/models", headers={"Authorization": wrong}).status_code == 401


def test_names_of_hosts_have_no_case() -> None:
    with client_of({"allowed_hosts": ["Chat.Example"]}) as client:
        assert client.get("/v1/models", headers={"Host": "chat.example:8000"}).status_code == 200


def test_what_looks_whether_somebody_is_there_may_ask_for_heads() -> None:
    with client_of() as client:
        assert [client.head(path).status_code for path in ("/", "/health", "/v1")] == [200, 200, 200]


def test_a_full_disk_is_no_fault_of_the_client_and_leaves_no_half_line(tmp_path, capsys) -> None:
    messages = [*USER, {"role": "assistant", "content": "hello"}]
    path = tmp_path / "liked.jsonl"
    with client_of({"feedback": str(path)}) as client:
        assert client.post("/feedback", json={"rating": "up", "messages": messages}).status_code == 200
        before = path.read_bytes()
        path.write_bytes(before + b'{"half')  # somebody was killed while he wrote
        assert client.post("/feedback", json={"rating": "up", "messages": messages}).status_code == 200
        assert [line for line in path.read_bytes().splitlines() if line.endswith(b"}")][1:] != []
        lone = json.dumps({"rating": "up", "messages": [{"role": "user", "content": "\ud800"}, messages[1]]})
        assert error_of(client.post("/feedback", content=lone, headers=JSON))[0] == 400
    with client_of({"feedback": "/dev/full"}) as client:
        status, message = error_of(client.post("/feedback", json={"rating": "up", "messages": messages}))
        assert status == 503 and "/dev/full" not in message
    assert "/dev/full: cannot be written" in capsys.readouterr().out


def test_a_file_for_feedback_that_cannot_be_written_ends_the_command() -> None:
    with pytest.raises(UserError, match="feedback=/proc/"):
        serve([], ServeSettings(port=0, feedback="/proc/none/liked.jsonl"), ())


# Connections, over a real socket.


class SlowReaderPool(ScriptedPool):
    """Has more to say than the system takes without a reader, and keeps its generations."""

    def __init__(self) -> None:
        super().__init__()
        text = "x" * 100_000
        self.updates = [{"text": text, "prompt_tokens": 1, "cached_tokens": 0}] * 300
        self.updates.append({"finish": "stop", "completion_tokens": 300})
        self.made: list[ScriptedGeneration] = []

    def submit(self, model: str, request: Any) -> ScriptedGeneration:
        self.made.append(super().submit(model, request))
        return self.made[-1]


@pytest.fixture(scope="module")
def served():
    """Port and pool of a server in a thread, with the patience of half a second."""
    settings = build(ServeSettings, {"limits": {"idle_seconds": IDLE, "streams": 20}})
    pool, listening = SlowReaderPool(), socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn_config(create_app(lambda: pool, settings), settings))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    yield listening.getsockname()[1], pool
    server.should_exit = True
    thread.join(20)


def head_of(length: int | str) -> bytes:
    return (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\n"
        f"{length if isinstance(length, str) else f'Content-Length: {length}'}\r\n\r\n"
    ).encode()


def read_to_end(connection: socket.socket) -> bytes:
    """What the server says until it closes the connection, within some seconds."""
    connection.settimeout(20)
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            found += data
    return found


WHOLE = json.dumps(CHAT).encode()


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"POST /v1/ch", b""),
        (head_of(500) + b'{"messages"', b"HTTP/1.1 408 "),
        (head_of("Transfer-Encoding: chunked") + b'5\r\n{"mes\r\n', b"HTTP/1.1 408 "),
        (head_of("Transfer-Encoding: chunked") + b"%x\r\n%s\r\n" % (len(WHOLE), WHOLE), b"HTTP/1.1 408 "),
    ],
    ids=["nothing", "half a head", "half a body", "half a chunk", "no last chunk"],
)
def test_a_client_that_sends_no_more_is_cut_off(served, sent: bytes, answer: bytes) -> None:
    port, pool = served
    asked = len(pool.asked)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(sent)
        found = read_to_end(connection)
    assert found.startswith(answer) and bool(found) == bool(answer)
    assert len(pool.asked) == asked


def test_a_head_that_comes_in_drops_is_cut_off(served) -> None:
    with socket.create_connection(("127.0.0.1", served[0])) as connection, pytest.raises(OSError):
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        for number in range(200):
            connection.sendall(b"X-%d: a\r\n" % number)
            time.sleep(0.05)


def test_a_client_that_does_not_read_is_cut_off_and_its_request_ends(served) -> None:
    port, pool = served
    body = json.dumps(CHAT | {"stream": True}).encode()
    with socket.socket() as connection:
        connection.connect(("127.0.0.1", port))
        connection.sendall(head_of(len(body)) + body)
        end = time.monotonic() + 5
        while not (pool.made and pool.made[-1].is_cancelled):
            assert time.monotonic() < end
            time.sleep(0.02)
        assert b"[DONE]" not in read_to_end(connection)


def test_a_slow_reader_is_not_cut_off(served) -> None:
    """The other side of it: as long as something is read."""
    body = json.dumps(CHAT | {"stream": True}).encode()
    with socket.create_connection(("127.0.0.1", served[0])) as connection:
        connection.sendall(head_of(len(body)) + body)
        connection.settimeout(20)
        for _ in range(6):
            connection.recv(4_000_000)
            time.sleep(IDLE / 4)
        end, found = time.monotonic() + 30, b""
        while not found.endswith(b"0\r\n\r\n") and time.monotonic() < end:
            found = found[-100:] + connection.recv(4_000_000)
    assert b"[DONE]" in found


def test_places_that_slow_clients_hold_are_free_again(served) -> None:
    port = served[0]
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(25)]
    for connection in slow:
        connection.sendall(head_of(500))
    statuses = {read_to_end(connection)[9:12] for connection in slow}
    assert statuses == {b"408", b"429"}
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head_of(len(WHOLE)) + WHOLE)
        connection.settimeout(20)
        assert connection.recv(12) == b"HTTP/1.1 200"
    for connection in slow:
        connection.close()


# The end of the server.


@pytest.mark.parametrize("signals", [1, 2])
def test_open_answers_are_ended_before_the_server_cancels_them(
    signals: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """After some seconds, or at once after a second signal. uvicorn would cut them off at that, with tracebacks."""
    seconds = 0.2 if signals == 1 else 60
    closed: list[float] = []

    class ClosingPool:
        async def close(self) -> None:
            closed.append(time.monotonic())

    async def stop() -> float:
        server = GracefulServer(uvicorn.Config(lambda: None, log_config=None))
        server.server_state.tasks.add(asyncio.ensure_future(asyncio.sleep(0)))
        ending = asyncio.create_task(_end_answers(server, [ClosingPool()], seconds))  # type: ignore[list-item]
        await asyncio.sleep(0.15)
        assert not closed
        told = time.monotonic()
        for _ in range(signals):
            server.handle_exit(signal.SIGINT, None)
        await asyncio.wait_for(ending, 10)
        assert not server.force_exit
        return told

    told = asyncio.run(stop())
    assert (0.19 if signals == 1 else 0) <= closed[0] - told < 5
    assert f"1 open request has {seconds:g} s to end" in capsys.readouterr().out


@pytest.mark.parametrize("began", [False, True])
def test_a_request_that_the_server_cancels_ends_without_a_traceback(began: bool) -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if began:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(60)

    async def note(message: Any) -> None:
        sent.append(message)

    async def cancelled() -> None:
        scope = {"type": "http", "path": "/health", "method": "GET", "headers": [(b"host", b"localhost")]}
        task = asyncio.create_task(Gate(app, ServeSettings(), ())(scope, note, note))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    asyncio.run(cancelled())
    assert sent[0]["status"] == (200 if began else 503)
