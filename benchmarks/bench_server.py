"""What serving costs: tokens a second of 32 streams over HTTP, beside the engine alone, in turns; and latencies.

    python benchmarks/bench_server.py [--bundle runs/demo/sft/bundle] [--streams 32] [--repeats 5]

Without a bundle the model has the shape of the demo and its first weights. No stop token ends an answer. The clients
only count bytes, so that they take little of the processor. Prints medians with their spread; with 100 streams also the
time to the first token and between two pieces, p50 and p95.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from nanochat_pl.common.wait_policy import wait_policy

os.environ.update(wait_policy(os.environ))  # as the command has it; read when torch is loaded
import torch
from bench_engine import demo_sized_bundle

from nanochat_pl import Engine, load_bundle
from nanochat_pl.bundle import StageInfo, save_bundle

NEW_TOKENS = 128


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


def engine_seconds(engine: Engine, count: int) -> float:
    """The same requests to the engine itself."""
    render = engine.tokenizer.render_for_completion
    prompts = [
        render({"messages": [{"role": "user", "content": f"What is {number} + {number + 1}?"}]})
        for number in range(count)
    ]
    began = time.perf_counter()
    engine.generate(prompts, NEW_TOKENS, 1.0, stop_ids=(), tools=False, max_batch=count)
    return time.perf_counter() - began


def percentile(values: list[float], share: float) -> float:
    """By nearest rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
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
    rates: list[tuple[float, float]] = []
    for _ in range(given.repeats + 1):
        alone = engine_seconds(engine, given.streams)
        served, _ = asyncio.run(all_streams(port, given.streams, NEW_TOKENS))
        rates.append((given.streams * NEW_TOKENS / alone, given.streams * NEW_TOKENS / served))
    rates = rates[1:]  # the first run warms up
    for name, values in zip(("engine alone", "over HTTP"), zip(*rates, strict=True), strict=True):
        spread = f"{statistics.median(values):,.0f} ({min(values):,.0f} … {max(values):,.0f}, n={len(values)})"
        print(f"server: {given.streams} streams, {name}: {spread} tokens/s, {torch.get_num_threads()} threads")
    ratios = [served / alone for alone, served in rates]
    print(f"server: ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})")
    _, streams = asyncio.run(all_streams(port, 100, 64))
    first = [stream.pieces[0] for stream in streams]
    between = [b - a for stream in streams for a, b in zip(stream.pieces, stream.pieces[1:], strict=False)]
    for name, values in (("time to the first piece", first), ("time between two pieces", between)):
        print(f"server: 100 streams, {name}: p50 {percentile(values, 0.5):.3f} s, p95 {percentile(values, 0.95):.3f} s")


if __name__ == "__main__":
    main()
