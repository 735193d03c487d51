"""What serving costs: tokens a second of 32 streams over HTTP, beside the engine alone, in turns; and latencies.

    python benchmarks/bench_server.py [--bundle runs/demo/sft/bundle] [--streams 32] [--repeats 5]

Without a bundle the model has the shape of the demo and its first weights. No stop token ends an answer. The clients
only count bytes, so that they take little of the processor. With 100 streams also the time to the first piece and
between two, p50 and p95.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from _report import parser_of, report, spread
from bench_engine import demo_sized_bundle

from nanochat_pl import Engine, load_bundle
from nanochat_pl.bundle import StageInfo, save_bundle


class Stream(NamedTuple):
    """Seconds from the request to each piece."""

    pieces: list[float]
    is_whole: bool


async def read_stream(port: int, number: int, new_tokens: int) -> Stream:
    """One request, read to its end."""
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": f"What is {number} + {number + 1}?"}],
            "stream": True,
            "max_tokens": new_tokens,
            "ignore_eos": True,
            "use_tools": False,
            "temperature": 1,
            "seed": number,
        }
    ).encode()
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    pieces, tail = [], b""
    while data := await reader.read(65536):
        tail = (tail + data)[-64:]
        if b'"content":"' in data:
            pieces.append(time.perf_counter() - began)
    writer.close()
    return Stream(pieces, b"[DONE]" in tail)


async def all_streams(port: int, count: int, new_tokens: int) -> tuple[float, list[Stream]]:
    """So many at once: seconds until the last has ended."""
    began = time.perf_counter()
    streams = await asyncio.gather(*(read_stream(port, number, new_tokens) for number in range(count)))
    assert all(stream.is_whole for stream in streams), "a stream was lost"
    return time.perf_counter() - began, streams


def engine_seconds(engine: Engine, count: int, new_tokens: int) -> float:
    """The same requests to the engine itself."""
    render = engine.tokenizer.render_for_completion
    prompts = [
        render({"messages": [{"role": "user", "content": f"What is {number} + {number + 1}?"}]})
        for number in range(count)
    ]
    began = time.perf_counter()
    engine.generate(prompts, new_tokens, 1.0, stop_ids=(), tools=False, max_batch=count)
    return time.perf_counter() - began


def percentile(values: list[float], share: float) -> float:
    """By nearest rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    """Measure everything and print it."""
    parser = parser_of(__doc__, streams=32, repeats=5, new_tokens=128, many=100)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--compile", action="store_true", help="the decode step, here and there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = given.bundle
        if path is None:
            made = demo_sized_bundle()
            path = save_bundle(Path(folder) / "bundle", StageInfo(stage="sft"), net=made.net, tokenizer=made.tokenizer)
        command = [sys.executable, "-m", "nanochat_pl.cli.main", "serve", f"bundle={path}", "port=0", "name=bench"]
        command += [f"num_slots={given.streams}", "accelerator=cpu", "page=false"]
        command += [f"compile={str(given.compile).lower()}"]
        program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert program.stdout is not None
            line = next(line for line in program.stdout if line.startswith("API:"))
            measure(int(re.search(r":(\d+)/v1", line)[1]), Engine(load_bundle(path), compile=given.compile), given)  # type: ignore[index]
        finally:
            program.terminate()
            program.wait()


def measure(port: int, engine: Engine, given: argparse.Namespace) -> None:
    """Turn by turn."""
    rates: dict[str, list[float]] = {"engine alone": [], "over HTTP": []}
    for turn in range(given.repeats + 1):
        alone = engine_seconds(engine, given.streams, given.new_tokens)
        served, _ = asyncio.run(all_streams(port, given.streams, given.new_tokens))
        for name, seconds in zip(rates, (alone, served), strict=True):
            rates[name] += [given.streams * given.new_tokens / seconds] if turn else []  # the first run warms up
    _, streams = asyncio.run(all_streams(port, given.many, 64))
    latencies = {
        "first piece": [stream.pieces[0] for stream in streams],
        "between two": [b - a for stream in streams for a, b in zip(stream.pieces, stream.pieces[1:], strict=False)],
    }
    found = {
        "settings": {"streams": given.streams, "new_tokens": given.new_tokens, "many": given.many},
        "over HTTP / engine alone": spread([served / alone for alone, served in zip(*rates.values(), strict=True)]),
        "tokens a second": {name: spread(values) for name, values in rates.items()},
        "seconds with many streams": {
            name: {f"p{round(100 * share)}": percentile(values, share) for share in (0.5, 0.95)}
            for name, values in latencies.items()
        },
    }
    report("server", given.repeats, found)


if __name__ == "__main__":
    main()
