"""A server in this process, with workers whose models say what scripts tell them: everything else is real."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import uvicorn

from nanochat_pl.bundle.bundle import Bundle, load_bundle, save_bundle
from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.model.gpt import GPT
from nanochat_pl.serving import pool, worker
from nanochat_pl.serving.app import create_app
from nanochat_pl.serving.run import uvicorn_config
from nanochat_pl.serving.settings import ServeSettings
from tests.helpers.small_engine import ScriptedNet, byte_tokenizer, mark, small_config

SEQUENCE_LEN = 2048
SLOW_SECONDS = 0.01  # a token of an answer to a message with "slow" in it

HOSTILE = """<img src=x onerror=alert(1)> and <script>alert(2)</script>

[a link](javascript:alert(3)), ![a cat](https://foreign.example/cat.png), ![inside](data:image/png;base64,iVBORw0KGgo=)

[shown as &lt;b&gt;](https://example.org/?a=<b>) <a href="javascript:alert(4)" onclick="alert(5)">x</a>

<style>* { display: none }</style> <svg onload=alert(6)></svg> `<iframe srcdoc="<script>alert(7)</script>">`

| a | b |
|--:|:-:|
| <b onmouseover=alert(8)>1</b> | 2 |

<form action=https://foreign.example><input name=q></form>"""

MARKDOWN = """A **short** answer with a list:

1. First, `code` in a line
2. Then a [link](https://example.org/)

```python
for n in range(3):
    print(n * n)  # squares
```

| n | square |
|--:|-------:|
| 2 | 4 |
| 12 | 144 |

> All of it is made up.

### Last

The end."""

TOOL = "It is <|python_start|>12*34<|python_end|><|output_start|>408<|output_end|>**408**, I think."

# What is answered to a message. Of several answers the first is by far the most likely one.
SCRIPTS: dict[str, list[str]] = {
    "Hello": ["Hello there, grüß Gott! How are you?", "Hello 🌍.", "Help is on its way."],
    "Hostile": [HOSTILE],
    "Markdown": [MARKDOWN],
    "What is 12 * 34?": [TOOL],
    "slow": ["".join(f"This is sentence number {n}. " for n in range(12))],
}


def script_of(message: str) -> list[str]:
    """The answers to a message."""
    return SCRIPTS.get("slow" if "slow" in message else message) or [f"You said: {message}"]


class ScriptedChoices(ScriptedNet):
    """A network with several answers to a message. It takes its time where the message has "slow" in it."""

    def __init__(self, net: GPT) -> None:
        super().__init__(lambda history: 0, SEQUENCE_LEN)
        self._real = net
        self._tokenizer = byte_tokenizer()

    def parameters(self):
        """Those of the real one: somebody counts them."""
        return self._real.parameters()

    def __call__(self, ids, cache, lengths=None, last_only=False):
        cache.begin(ids, lengths).commit()
        logits = torch.zeros(len(ids), self.config.vocab_size)
        for row, length in enumerate(cache.positions.tolist()):
            message, answer = self._read(cache.ids[row, :length].tolist())
            scripts = [[*mark(each), self._id("assistant_end")] for each in script_of(message)]
            fitting = [each for each in scripts if each[: len(answer)] == answer and len(each) > len(answer)]
            for rank, token in enumerate(dict.fromkeys(each[len(answer)] for each in fitting)):
                logits[row, token] = 20.0 - 3 * rank
            if not fitting:
                logits[row, self._id("assistant_end")] = 20.0
            if "slow" in message:
                time.sleep(SLOW_SECONDS)
        return logits

    def _id(self, name: str) -> int:
        return self._tokenizer.special_ids[f"<|{name}|>"]

    def _read(self, history: list[int]) -> tuple[str, list[int]]:
        """The last message, and what there is of the answer."""

        def after(name: str) -> int:
            return len(history) - history[::-1].index(self._id(name)) if self._id(name) in history else 0

        message = self._tokenizer.decode(history[after("user_start") : max(0, after("user_end") - 1)])
        return message, history[after("assistant_start") :]


def load_scripted(path: Path, device: str) -> Bundle:
    """In place of the worker's load_bundle."""
    bundle = load_bundle(path, device=device)
    return replace(bundle, net=ScriptedChoices(bundle.net))  # type: ignore[arg-type]


def worker_main(connection: Connection, spec: Mapping[str, Any]) -> None:
    """The worker process."""
    worker.load_bundle = load_scripted  # type: ignore[assignment]
    worker.main(connection, spec)


def save_small_bundle(folder: Path) -> Path:
    """A bundle that a worker can load."""
    net = GPT(small_config(SEQUENCE_LEN)).materialise().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(0))
    metrics = {"val/bpb": 0.9123, "val/bpb_stderr": 0.004, "tasks": {"arithmetic": 0.5, "arithmetic_stderr": 0.05}}
    return save_bundle(folder, StageInfo("sft", step=60, metrics=metrics), net, byte_tokenizer())


class RunningServer:
    """A server that listens on a free port.

    Attributes:
        url: of its page, without the slash.
        settings: what it was started with.
        pool: its workers, once it is up.
    """

    def __init__(self, settings: ServeSettings, models: Mapping[str, Path], keys: Sequence[str]) -> None:
        self.settings, self._models, self._keys = settings, models, keys
        self._ready = threading.Event()
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(128)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.pool: pool.Pool | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._ready.wait(120), "the server does not start"

    async def _run(self) -> None:
        def make_pool() -> pool.Pool:
            base = {"device": "cpu", "num_threads": 1, "num_slots": 4, "max_context": None, "prefill_chunk": 256}
            base["stream_interval"] = self.settings.stream_interval
            self.pool = pool.Pool([(name, {**base, "bundle": str(path)}) for name, path in self._models.items()])
            return self.pool

        self._server = uvicorn.Server(uvicorn_config(create_app(make_pool, self.settings, self._keys), self.settings))
        serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while self.pool is None:
            await asyncio.sleep(0.01)
        await self.pool.started()
        self._ready.set()
        await serving

    def close(self) -> None:
        """Stop it."""
        self._server.should_exit = True
        self._thread.join(20)


@contextmanager
def scripted_server(
    folder: Path, names: Sequence[str] = ("demo",), keys: Sequence[str] = (), **settings: Any
) -> Iterator[RunningServer]:
    """A server with a worker for each name."""
    bundle = folder / "bundle"
    if not bundle.exists():
        save_small_bundle(bundle)
    real = pool.worker
    pool.worker = SimpleNamespace(main=worker_main)  # type: ignore[assignment]
    server = RunningServer(ServeSettings(port=0, **settings), dict.fromkeys(names, bundle), keys)
    try:
        yield server
    finally:
        server.close()
        pool.worker = real
