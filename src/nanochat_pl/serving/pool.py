"""The worker processes, seen from the server's event loop: requests go to the least loaded one of a model, a worker
that dies is started again, and its requests end in an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from nanochat_pl.common.console import print_from_any_rank
from nanochat_pl.common.errors import UserError
from nanochat_pl.serving import worker
from nanochat_pl.serving.errors import ApiError

State = Literal["starting", "ready", "stuck", "dead"]
MAX_JOINED = 10_000  # characters of an update to which nothing is added: each time all of it is copied
STUCK_SECONDS = 30.0  # without a word of a worker that has something to do
RESTART_SECONDS = (0.0, 1.0, 5.0, 15.0, 60.0)  # before the first restart, the second …; a minute of health forgives


class Updates:
    """The updates of several requests for one reader, each with the number of its request, in the order in which they
    came. What it has not taken yet grows: a reader that is behind gets fewer and longer ones.
    """

    def __init__(self) -> None:
        self._unread: deque[tuple[int, dict[str, Any]]] = deque()
        self._last: dict[int, dict[str, Any]] = {}  # of those, by number
        self._arrival: asyncio.Future[None] | None = None

    def put(self, number: int, update: Mapping[str, Any]) -> None:
        """Add one."""
        last = self._last.get(number)
        text = "" if last is None else last.get("text", "")
        # Within an update calls and results stand before the text.
        if last is None or "error" in update or ("tools" in update and text) or len(text) > MAX_JOINED:
            last = self._last[number] = {}
            self._unread.append((number, last))
        for key, value in update.items():
            last[key] = last[key] + value if key in ("text", "tools", "tokens") and key in last else value
        self._end_waiting()

    def take(self) -> tuple[int, dict[str, Any]] | None:
        """The first one, or None."""
        if not self._unread:
            return None
        number, update = self._unread.popleft()
        if self._last[number] is update:
            del self._last[number]
        return number, update

    async def wait(self, seconds: float) -> None:
        """Until there is one, or so many seconds are over."""
        if self._unread:
            await asyncio.sleep(0)  # others have their turn, and who has left is noticed
            return
        loop = asyncio.get_running_loop()
        # No task and no asyncio.timeout: with many streams they would take as long as all else here.
        self._arrival = loop.create_future()
        timer = loop.call_later(seconds, self._end_waiting)
        try:
            await self._arrival
        finally:
            timer.cancel()
            self._arrival = None

    def _end_waiting(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)


class Generation:
    """A request at a worker.

    Its updates (see :mod:`~nanochat_pl.serving.worker`) are kept until they are asked for; the last one has ``finish``
    or ``error``.
    """

    def __init__(self, owner: WorkerProcess, name: str) -> None:
        self._owner, self._name = owner, name
        self.model, self.worker = owner.model, owner.number
        self._updates = Updates()
        self._number = 0
        self.began = time.monotonic()

    def deliver_to(self, updates: Updates, number: int) -> None:
        """Put the updates there, each with this number: those that came before this, and those to come."""
        before, self._updates, self._number = self._updates, updates, number
        while (found := before.take()) is not None:
            self.put(found[1])

    def put(self, update: dict[str, Any]) -> None:
        """An update is there."""
        self._updates.put(self._number, update)

    def cancel(self) -> None:
        """End it, unless it has ended; its slot is free in the worker's next step."""
        self._owner.forget(self._name)


class WorkerProcess:
    """A worker, and what is known of it.

    Attributes:
        model: the name of what it serves.
        number: its place among the workers of the pool.
        card: what its model is, once it is ready.
        stats: its figures, see :mod:`~nanochat_pl.serving.worker`.
        num_restarts: how often it was started again.
        failed: why it could not be started: it is not tried again.
    """

    _names = itertools.count()
    # A process has the priority of the thread that starts it, and that of the event loop is lowered later on.
    _starter = ThreadPoolExecutor(1)

    def __init__(self, model: str, spec: Mapping[str, Any], number: int) -> None:
        self.model, self._spec, self.number = model, spec, number
        self.card: dict[str, Any] | None = None
        self.stats: dict[str, Any] = {}
        self.num_restarts = 0
        self.failed: list[str] = []
        self._running: dict[str, Generation] = {}
        self._heard_at = self._ready_at = time.monotonic()
        self._closing = False
        self._started = asyncio.Event()
        self._start()

    @property
    def state(self) -> State:
        """Whether it works."""
        if not self._process.is_alive():
            return "dead"
        if self.card is None:
            return "starting"
        return "stuck" if self._running and self.silent_for > STUCK_SECONDS else "ready"

    @property
    def silent_for(self) -> float:
        """Seconds since it was heard of."""
        return time.monotonic() - self._heard_at

    @property
    def load(self) -> int:
        """Requests that it has."""
        return len(self._running)

    async def started(self) -> None:
        """Wait until its model is loaded. Raises :class:`UserError` where it cannot be."""
        await self._started.wait()
        if self.failed:
            raise UserError(self.failed)

    def submit(self, request: Mapping[str, Any]) -> Generation:
        """Give it a request."""
        name = str(next(self._names))
        generation = self._running[name] = Generation(self, name)
        self._outbox.put({"id": name, "request": request})
        return generation

    def forget(self, name: str) -> None:
        """Nobody waits for a request any more."""
        if self._running.pop(name, None) is not None:
            self._outbox.put({"cancel": name})

    async def close(self) -> None:
        """End the process."""
        self._closing = True
        self._detach("The server is shutting down.", "shutting_down")
        self._process.terminate()
        await asyncio.to_thread(self._process.join, 3)
        if self._process.is_alive():
            self._process.kill()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=worker.main, args=(theirs, self._spec), daemon=True)
        self._starter.submit(self._process.start).result()
        theirs.close()
        self.card, self.stats, self._heard_at = None, {}, time.monotonic()
        # A pipe that is full would hold up the event loop.
        self._outbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=_send_all, args=(self._connection, self._outbox), daemon=True).start()
        asyncio.get_running_loop().add_reader(self._connection.fileno(), self._read)

    def _read(self) -> None:
        try:
            while self._connection.poll():
                self._take(json.loads(self._connection.recv_bytes()))
        except (EOFError, OSError):
            self._died()

    def _take(self, message: Mapping[str, Any]) -> None:
        self._heard_at = time.monotonic()
        if "ready" in message:
            self.card, self._ready_at = message["ready"], self._heard_at
            self._started.set()
        elif "failed" in message:
            self.failed = list(message["failed"])
            if self.num_restarts:  # at the first start the command ends with it
                print_from_any_rank(f"{self.model}: cannot be started again: {' '.join(self.failed)}")
        else:
            self.stats = message["stats"]
            for name, update in message["updates"]:
                if (generation := self._running.get(name)) is not None:
                    if "finish" in update or "error" in update:
                        del self._running[name]
                    generation.put(update)

    def _detach(self, why: str, code: str) -> None:
        """End all requests with an error, and let go of the pipe."""
        with contextlib.suppress(OSError, ValueError):
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
        self._outbox.put(None)
        self._connection.close()
        for generation in self._running.values():
            generation.put({"error": {"status": 503, "message": why, "code": code}})
        self._running = {}

    def _died(self) -> None:
        self._detach("The process that was answering has ended; ask again.", "worker_ended")
        if self.failed or self._closing:
            self._started.set()
            return
        if time.monotonic() - self._ready_at > 60:
            self.num_restarts = 0
        wait = RESTART_SECONDS[min(self.num_restarts, len(RESTART_SECONDS) - 1)]
        self.num_restarts += 1
        asyncio.get_running_loop().call_later(wait, self._restart)
        when = f"in {wait:g} s" if wait else "now"
        print_from_any_rank(
            f"{self.model}: the process that answers has ended unexpectedly; it is started again {when}."
        )

    def _restart(self) -> None:
        if not self._closing:
            self._process.join(timeout=0)
            self._start()


def _send_all(connection: Any, outbox: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    while (message := outbox.get()) is not None:
        try:
            connection.send_bytes(json.dumps(message).encode())
        except (OSError, ValueError):
            return  # it has died; its requests are told where its end is noticed


class Pool:
    """All workers.

    Args:
        specs: of each worker the name of its model and what it is started with.
    """

    def __init__(self, specs: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        self.workers = [WorkerProcess(model, spec, number) for number, (model, spec) in enumerate(specs)]

    async def started(self) -> None:
        """Wait until every model is loaded. Raises :class:`UserError` where one cannot be."""
        await asyncio.gather(*(each.started() for each in self.workers))

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """The models that are served, by name, each with its card."""
        cards: dict[str, dict[str, Any]] = {}
        for each in self.workers:
            cards.setdefault(each.model, each.card or {})
        return cards

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return sum(max(0, each.load - each.stats.get("slots", each.load)) for each in self.workers)

    def free_slots(self, model: str) -> int:
        """Requests for a model that would not have to wait."""
        workers = [each for each in self.workers if each.model == model]
        return sum(max(0, (each.card or {}).get("num_slots", 0) - each.load) for each in workers)

    def submit(self, model: str, request: Mapping[str, Any]) -> Generation:
        """Give a request to the least loaded worker of a model.

        Raises:
            ApiError: no worker of it is ready.
        """
        workers = [each for each in self.workers if each.model == model]
        ready = [each for each in workers if each.state == "ready"]
        if not ready:
            if all(each.failed for each in workers):
                raise ApiError(
                    503, f"{model}: its process has ended and cannot be started again; the server's log says why."
                )
            raise ApiError(
                503, f"{model}: is being loaded; ask again in some seconds.", code="not_ready", retry_after=3
            )
        return min(ready, key=lambda each: each.load).submit(request)

    async def close(self) -> None:
        """End all workers."""
        await asyncio.gather(*(each.close() for each in self.workers))
