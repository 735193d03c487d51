"""What serving costs: tokens a second of 32 streams over HTTP, beside the engine alone, in turns; and latencies.

    python benchmarks/bench_server.py [--bundle runs/demo/sft/bundle] [--streams 32] [--turns 2] [--repeats 2]

Each of the clients asks again, over the same connection, as soon as it has its answer, and the answers are of many
lengths, so that requests begin and end while others are being answered, as they do on a server. The engine alone is
given the same requests at once and works on as many at a time. It is the one of the server's worker, in its process: of
two processes with one model either can be a tenth faster, by the memory that it gets. That both draw the same tokens is
looked at first. With ``--turns 1`` and ``--even`` all requests begin and end together.

Without a bundle the model has the shape of the demo and its first weights. No stop token ends an answer. The clients
only count bytes, so that they take little of the processor. The server's cache may hold the beginning of a prompt from
the turn before; prompts have some 20 tokens. With 100 streams also the time from the request to the first piece and
between two, p50 and p95.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from _report import parser_of, report, spread
from bench_engine import demo_sized_bundle

from nanochat_pl import Engine
from nanochat_pl.bundle.bundle import save_bundle
from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.cli.main import main as main_of_command
from nanochat_pl.common.files import write_json, write_text
from nanochat_pl.engine.request import Request
from nanochat_pl.engine.sampling import Sampling
from nanochat_pl.serving import pool, worker

SAMPLING = {"temperature": 1.0, "top_k": 50}
MAX_SECONDS = 600.0  # for all requests to the engine
SHORT = 1, 24  # a request's number and the tokens of its answer
FOLDER = "NANOCHAT_PL_BENCH_FOLDER"  # in the environment: where server and benchmark leave each other files


class Stream(NamedTuple):
    """Seconds from the request to each piece."""

    pieces: list[float]


def question(number: int) -> list[dict[str, str]]:
    """The messages of a request."""
    return [{"role": "user", "content": f"What is {number} + {number + 1}?"}]


def lengths(count: int, mean: int, even: bool) -> list[int]:
    """Tokens of the answers: from half of the mean to one and a half times it, or all of them the same."""
    random = Random(0)
    return [mean if even else round(random.uniform(0.5, 1.5) * mean) for _ in range(count)]


def request_body(number: int, new_tokens: int, **others: object) -> bytes:
    """A request with its head."""
    asked = {"messages": question(number), "max_tokens": new_tokens, "ignore_eos": True, "use_tools": False}
    body = json.dumps(asked | SAMPLING | {"seed": number} | others).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def read_stream(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int, new_tokens: int
) -> Stream:
    """One request, read to its end."""
    began = time.perf_counter()
    writer.write(request_body(number, new_tokens, stream=True))
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0], head.decode()
    pieces, tail = [], b""
    while not tail.endswith(b"0\r\n\r\n"):  # the last chunk
        data = await reader.read(65536)
        assert data, "a stream was lost"
        tail = (tail + data)[-64:]
        if b'"content":"' in data:
            pieces.append(time.perf_counter() - began)
    assert b"[DONE]" in tail, "a stream was lost"
    return Stream(pieces)


async def all_streams(port: int, count: int, new_tokens: list[int]) -> tuple[float, list[Stream]]:
    """A request for each number of tokens, so many at once: seconds until the last has ended."""
    requests = iter(enumerate(new_tokens))
    streams: list[Stream] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number, tokens in requests:
            streams.append(await read_stream(reader, writer, number, tokens))
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(count)))
    return time.perf_counter() - began, streams


def engine_seconds(engine: Engine, count: int, new_tokens: list[int]) -> float:
    """The same requests to the engine itself."""
    scheduler = engine.scheduler(count)
    began = time.perf_counter()
    for number, tokens in enumerate(new_tokens):
        scheduler.submit(engine_request(engine, number, tokens))
    while not scheduler.idle:
        scheduler.step()
    return time.perf_counter() - began


def engine_request(engine: Engine, number: int, new_tokens: int) -> Request:
    """What the server makes of a request."""
    prompt = engine.tokenizer.render_for_completion({"messages": question(number)})
    return Request(prompt, new_tokens, Sampling(**SAMPLING, seed=number), frozenset(), tools=False)


def serve(arguments: list[str]) -> int:
    """The command ``serve``, whose worker also measures its engine alone: the program that this one starts."""
    pool.worker = argparse.Namespace(main=work)  # type: ignore[assignment]
    return main_of_command(["serve", *arguments])


def work(connection: Connection, spec: Mapping[str, Any]) -> None:
    """The worker's process: as it is, but a signal makes it measure."""
    folder = Path(os.environ[FOLDER])

    class MeasuringWorker(worker.Worker):
        def serve(self) -> None:
            signal.signal(signal.SIGUSR1, lambda *_: self.measure())
            write_text(folder / "pid", str(os.getpid()))
            super().serve()

        def measure(self) -> None:
            try:
                scheduler = self._engine.scheduler(1)
                handle = scheduler.submit(engine_request(self._engine, *SHORT))
                scheduler.run([handle])
                count, tokens = json.loads((folder / "asked").read_text())
                found: Any = [engine_seconds(self._engine, count, tokens), handle.ids]
            except Exception as error:  # whoever waits for the file is told
                found = repr(error)
            write_json(folder / "found", found)

    worker.Worker = MeasuringWorker  # type: ignore[misc]
    worker.main(connection, spec)


def measured_alone(folder: Path, count: int, new_tokens: list[int]) -> tuple[float, list[int]]:
    """Seconds of the worker's engine for the requests, and what it answers to the short one."""
    write_json(folder / "asked", [count, new_tokens])
    os.kill(int(awaited(folder / "pid")), signal.SIGUSR1)
    found = json.loads(awaited(folder / "found"))
    (folder / "found").unlink()
    assert isinstance(found, list), f"the worker failed: {found}"
    return found[0], found[1]


def awaited(path: Path) -> str:
    """The text of a file that is coming."""
    ends_at = time.monotonic() + MAX_SECONDS
    while not path.exists():
        assert time.monotonic() < ends_at, f"{path.name} did not come: the worker has died"
        time.sleep(0.005)
    return path.read_text()


async def short_answer(port: int) -> list[int]:
    """The tokens of one over HTTP."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_body(*SHORT, return_token_details=True))
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
    tokens = json.loads(await reader.readexactly(length))["choices"][0]["message"]["nanochat"]["tokens"]
    writer.close()
    return [token["id"] for token in tokens]


def percentile(values: list[float], share: float) -> float:
    """By nearest rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    """Measure everything and print it."""
    parser = parser_of(__doc__, streams=32, turns=2, repeats=2, new_tokens=128, many=100)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--even", action="store_true", help="all answers of one length")
    parser.add_argument("--compile", action="store_true", help="the decode step, here and there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = given.bundle
        if path is None:
            made = demo_sized_bundle()
            path = save_bundle(Path(folder) / "bundle", StageInfo(stage="sft"), net=made.net, tokenizer=made.tokenizer)
        command = [sys.executable, __file__, "serve", f"bundle={path}", "port=0", "name=bench", "page=false"]
        command += [f"num_slots={given.streams}", "accelerator=cpu", f"compile={str(given.compile).lower()}"]
        program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, FOLDER: folder})
        try:
            assert program.stdout is not None
            line = next(line for line in program.stdout if line.startswith("API:"))
            measure(int(re.search(r":(\d+)/v1", line)[1]), Path(folder), given)  # type: ignore[index]
        finally:
            program.terminate()
            program.wait()


def measure(port: int, folder: Path, given: argparse.Namespace) -> None:
    """Turn by turn."""
    tokens = lengths(given.streams * given.turns, given.new_tokens, given.even)
    rates: dict[str, list[float]] = {"engine alone": [], "over HTTP": []}
    for turn in range(given.repeats + 1):
        seconds_alone, ids = measured_alone(folder, given.streams, tokens)
        assert turn or ids == asyncio.run(short_answer(port)), "the server and the engine draw other tokens"
        served, _ = asyncio.run(all_streams(port, given.streams, tokens))
        for name, seconds in zip(rates, (seconds_alone, served), strict=True):
            rates[name] += [sum(tokens) / seconds] if turn else []  # the first run warms up
    _, streams = asyncio.run(all_streams(port, given.many, [64] * given.many))
    latencies = {
        "first piece": [stream.pieces[0] for stream in streams],
        "between two": [b - a for stream in streams for a, b in zip(stream.pieces, stream.pieces[1:], strict=False)],
    }
    found = {
        "settings": {
            name: getattr(given, name) for name in ("streams", "turns", "new_tokens", "even", "many", "compile")
        },
        "over HTTP / engine alone": spread([served / alone for alone, served in zip(*rates.values(), strict=True)]),
        "tokens a second": {name: spread(values) for name, values in rates.items()},
        "seconds with many streams": {
            name: {f"p{round(100 * share)}": percentile(values, share) for share in (0.5, 0.95)}
            for name, values in latencies.items()
        },
    }
    report("server", given.repeats, found)


if __name__ == "__main__":
    sys.exit(serve(sys.argv[2:]) if sys.argv[1:2] == ["serve"] else main())
