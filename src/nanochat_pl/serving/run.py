"""Runs the server until it is stopped."""

from __future__ import annotations

import asyncio
import errno
import functools
import gc
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import uvicorn

from nanochat_pl.common.console import ignore_broken_pipe
from nanochat_pl.common.errors import UserError
from nanochat_pl.serving.app import create_app
from nanochat_pl.serving.connection import Connection
from nanochat_pl.serving.feedback import Feedback
from nanochat_pl.serving.pool import Pool
from nanochat_pl.serving.settings import KEY_VARIABLE, ServeSettings

# What the server's priority is lowered by.
NICENESS = 7


@ignore_broken_pipe()
def serve(specs: Sequence[tuple[str, Mapping[str, Any]]], settings: ServeSettings, keys: Sequence[str]) -> int:
    """Serve until SIGINT or SIGTERM; then open answers have some seconds to end.

    Args:
        specs: of each worker the name of its model and what it is started with.
        settings: of the server.
        keys: API keys.

    Raises:
        UserError: the address is taken or is none of this machine's, the feedback's file cannot be written, or a model
            cannot be loaded.
    """
    if settings.feedback:
        try:
            Feedback(settings.feedback)  # before anything is loaded
        except UserError as error:
            raise UserError(f"feedback={error.problems[0]}", "Give a file that can be written.") from error
    listening = _listen(settings.host, settings.port)
    with listening:
        return asyncio.run(_serve(listening, specs, settings, keys))


class GracefulServer(uvicorn.Server):
    """uvicorn's, but a second Ctrl-C ends open answers at once with an error, in place of cutting them off.

    Attributes:
        is_hurried: whether there was one.
    """

    is_hurried = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to stop. Only the third one cuts off what is open."""
        if sig == signal.SIGINT and self.should_exit and not self.is_hurried:
            self.is_hurried = True
        else:
            super().handle_exit(sig, frame)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise UserError(
            f"host={host} port={port}: cannot listen there: {error.strerror or error}.",
            fix=_fix(error),
        ) from error
    listening.listen(1024)
    return listening


def _fix(error: OSError) -> str:
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return "host must be an address of this machine: 127.0.0.1, or 0.0.0.0 for all that it has."
    if error.errno in (errno.EACCES, errno.EPERM):
        return "Ports below 1024 are the system's: choose another one, as port=8000."
    return "Another program has the port: choose another one, or port=0 for any free one."


def uvicorn_config(app: Any, settings: ServeSettings) -> uvicorn.Config:
    """How uvicorn serves an app: no log of requests, no websockets, and idle connections are cut off."""
    return uvicorn.Config(
        app,
        http=functools.partial(Connection, idle_seconds=settings.limits.idle_seconds),  # type: ignore[arg-type]
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        # A little later than open answers are ended with an error, see _end_answers.
        timeout_graceful_shutdown=round(settings.shutdown_seconds) + 3,
    )


async def _serve(
    listening: socket.socket,
    specs: Sequence[tuple[str, Mapping[str, Any]]],
    settings: ServeSettings,
    keys: Sequence[str],
) -> int:
    pools: list[Pool] = []

    def make_pool() -> Pool:
        pools.append(Pool(specs))
        return pools[-1]

    app = create_app(make_pool, settings, keys)
    server = GracefulServer(uvicorn_config(app, settings))
    running = asyncio.create_task(server.serve(sockets=[listening]))
    ending = asyncio.create_task(_end_answers(server, pools, settings.shutdown_seconds))
    while not (server.started or running.done()):
        await asyncio.sleep(0.02)
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    base = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    failed: UserError | None = None
    if pools:
        print(f"Loading {', '.join(pools[0].models)}; then {base} answers.", flush=True)
        try:
            loading = asyncio.create_task(pools[0].started())
            await asyncio.wait({loading, running}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                gc.collect()
                gc.freeze()  # what is there by now stays: a collection would hold up all streams for that long
                _let_workers_go_first(pools[0])
                _announce(base, pools[0], settings, bool(keys))
            else:
                loading.cancel()
        except UserError as error:
            failed, server.should_exit = error, True
    await running
    ending.cancel()
    if failed is not None:
        raise failed
    return 0


def _let_workers_go_first(pool: Pool) -> None:
    """Lower the priority of what answers requests where models are on the processors, and not that of the workers.

    A forward stands still while one of its threads has to wait for a processor. The threads have gaps enough, between
    a forward's parts, for what there is to do here.
    """
    if hasattr(os, "nice") and any(card["device"] == "cpu" for card in pool.models.values()):
        os.nice(NICENESS)


async def _end_answers(server: GracefulServer, pools: Sequence[Pool], seconds: float) -> None:
    """Once the server is told to stop, end what is open after some seconds with an error that clients understand."""
    while not server.should_exit:
        await asyncio.sleep(0.1)
    if count := len(server.server_state.tasks):
        what = "1 open request has" if count == 1 else f"{count} open requests have"
        print(f"\nStopping: {what} {seconds:g} s to end. Ctrl-C again ends them now.", flush=True)
    ends_at = time.monotonic() + seconds
    while server.server_state.tasks and time.monotonic() < ends_at and not server.is_hurried:
        await asyncio.sleep(0.05)
    for pool in pools:
        await pool.close()


def _announce(base: str, pool: Pool, settings: ServeSettings, has_keys: bool) -> None:
    for name, card in pool.models.items():
        what = f"{card['stage']}, depth {card['depth']}, {card['parameters']:,} parameters, {card['dtype']}"
        print(f"{name}: {what}, on {card['device']}")
    if settings.page:
        print(f"Page: {base}/")
    if has_keys:
        print(f"Key:  is asked for ({KEY_VARIABLE} or api_key_file)")
    if not settings.is_local:
        print("Other machines reach it by this one's name or address, at the same port.")
    print(f"API:  {base}/v1   (base_url of an OpenAI client; model={next(iter(pool.models))})", flush=True)
