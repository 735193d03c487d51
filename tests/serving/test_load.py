"""Many clients at once, and for long: nothing is lost, mixed up or kept."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from tests.helpers.served import Served, tiny_model_served
from tests.serving.test_clients import worker_pids

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    with tiny_model_served(tmp_path_factory.mktemp("served"), "num_slots=16", "limits.queue=1000") as running:
        yield running


async def ask(port: int, seed: int, max_tokens: int, leave_after: float | None = None) -> str:
    """The text of a streamed answer; with a time, the client is gone after it."""
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "Return the number " * (1 + seed % 3)}],
            "stream": True,
            "max_tokens": max_tokens,
            "temperature": 1,
            "seed": seed,
            "ignore_eos": leave_after is not None,
        }
    ).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "Connection: close", "", ""])
    writer.write(head.encode() + body)
    try:
        raw = await asyncio.wait_for(reader.read(), leave_after or 120)
    except TimeoutError:
        return ""
    finally:
        writer.close()
    assert b"[DONE]" in raw, raw[-500:]
    chunks = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith(b"data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def run_all(*waiting) -> list[str]:
    async def together() -> list[str]:
        return await asyncio.gather(*waiting)

    return asyncio.run(together())


def port_of(server: Served) -> int:
    return int(server.url.rpartition(":")[2])


def is_quiet(status, found) -> bool:
    return all(each["running"] == each["waiting"] == 0 for each in found["workers"])


def test_100_streams_at_once_get_the_answers_that_they_get_alone(server):
    port = port_of(server)
    together = run_all(*(ask(port, seed, 40) for seed in range(100)))
    assert together == [run_all(ask(port, seed, 40))[0] for seed in range(100)]
    assert len(set(together)) > 90


def test_200_clients_that_vanish_leave_no_slot_taken(server):
    """While they wait for a slot, while their prompt is read, while they are answered."""
    port = port_of(server)
    run_all(*(ask(port, seed, 100, leave_after=0.02 * (seed % 10 + 1)) for seed in range(200)))
    server.wait_until("/stats", is_quiet, seconds=10)
    assert run_all(ask(port, 1, 10)) == run_all(ask(port, 1, 10))


def memory_of(pids: list[int]) -> int:
    """Bytes that processes hold."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") for pid in pids)


def test_2000_requests_take_no_memory(server):
    port = port_of(server)
    pids = [server.program.pid, *worker_pids(server)]

    def requests(count: int) -> None:
        for start in range(0, count, 50):
            run_all(*(ask(port, seed, 6) for seed in range(start, start + 50)))

    requests(1500)
    before = memory_of(pids)
    requests(2000)
    assert memory_of(pids) - before < 16 * 2**20
