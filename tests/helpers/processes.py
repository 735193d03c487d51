"""Jobs on several processes that speak to each other with gloo: one pool of workers for the whole test run.

    results = run(3, job, "plain", 4)      # job("plain", 4) on ranks 0, 1 and 2; their results in that order

A job is a function at the top of a module under ``tests``. Arguments and results are plain data and tensors: they go
through ``torch.save`` and come back without pickle. Workers are started when first needed, have one thread each, and
end with the test run. Each job has a process group of its own, by the same ``collectives.start`` as a training.
"""

from __future__ import annotations

import importlib
import io
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.forked import ROOT, Forked

WORKERS = 4
GRACE = 5.0  # seconds that the others get to end, after one has failed


class JobFailed(Exception):
    """A worker raised, died or took too long; the text has the traceback of each."""


def run(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    timeout: float = 240.0,
) -> list[Any]:
    """Call a function on so many processes at once, and give back what each returned, in the order of the ranks.

    Args:
        environment: variables that are set during the job.
        timeout: seconds; the workers are killed after that.

    Raises:
        JobFailed: a worker raised, died or took too long.
    """
    assert 1 <= world_size <= WORKERS, world_size
    _start_workers()
    with socket.create_server(("127.0.0.1", 0)) as server:  # of a peer of torch's own server the DNS is asked
        port, descriptor = server.getsockname()[1], server.detach()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        variables = {**(environment or {}), **{key: str(value) for key, value in {**place, **meeting}.items()}}
        job = {"module": function.__module__, "function": function.__qualname__, "arguments": list(arguments)}
        _workers[rank][1].send_bytes(_packed({**job, "environment": variables}))
    answers = _answers(world_size, timeout)
    failures = [f"process {rank}: {answer['error']}" for rank, answer in answers.items() if "error" in answer]
    if failures:
        raise JobFailed("\n".join(failures))
    return [answers[rank]["result"] for rank in range(world_size)]


_workers: list[tuple[Forked, Connection]] = []


def _start_workers() -> None:
    while len(_workers) < WORKERS:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
        command = ["-m", "tests.helpers.processes", str(theirs.fileno())]
        worker = Forked(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        _workers.append((worker, Connection(ours.detach())))


def _kill_workers() -> None:
    for worker, connection in _workers:
        worker.kill()
        worker.wait()
        connection.close()
    _workers.clear()


def _answers(world_size: int, timeout: float) -> dict[int, dict[str, Any]]:
    """What each worker answers, by rank. Where one fails, all are killed, to be made anew: what it leaves behind
    (half a process group, a peer that still waits for it) is not for the next job."""
    ranks = {connection: rank for rank, (_, connection) in enumerate(_workers[:world_size])}
    answers: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + timeout
    while ranks and (ready := wait(list(ranks), max(0.0, deadline - time.monotonic()))):
        for connection in ready:
            rank = ranks.pop(connection)
            try:
                answers[rank] = _unpacked(connection.recv_bytes())
            except (EOFError, ConnectionResetError):
                answers[rank] = {"error": f"died with exit code {_workers[rank][0].wait()}"}
            if "error" in answers[rank]:
                deadline = min(deadline, time.monotonic() + GRACE)
    answers |= {rank: {"error": "was not done in time"} for rank in ranks.values()}
    if any("error" in answer for answer in answers.values()):
        _kill_workers()
    return dict(sorted(answers.items()))


def _packed(message: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(message, buffer)
    return buffer.getvalue()


def _unpacked(message: bytes) -> Any:
    return torch.load(io.BytesIO(message), weights_only=True)


# The worker's side.


def _work(connection: Connection) -> None:
    while True:
        try:
            job = _unpacked(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(_do(job))


def _do(job: Mapping[str, Any]) -> bytes:
    from nanochat_pl.distributed import collectives

    before = dict(os.environ)
    os.environ.update(job["environment"])
    dist.set_debug_level_from_env()
    try:
        collectives.start(torch.device("cpu"))
        collectives.barrier()  # one whose work needs no other would else be gone before the last has reached it
        function = getattr(importlib.import_module(job["module"]), job["function"])
        return _packed({"result": function(*job["arguments"])})
    except Exception:
        return _packed({"error": traceback.format_exc()})
    finally:
        collectives.stop()
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _work(Connection(int(sys.argv[1])))
