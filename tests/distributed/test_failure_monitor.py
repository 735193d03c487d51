"""One process fails: all end soon, and the error that comes first is the true one."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tests.helpers.launch import free_port

# Two or three processes with a watchdog that looks ten times a second. What each does is a line of Python.
PROGRAM = """
import os, signal, subprocess, sys, time
import torch
from nanochat_pl.distributed import collectives
from nanochat_pl.common.errors import SharedError, UserError
from nanochat_pl.distributed.failure_monitor import Pace, watchdog

def report(error):
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, UserError) else 1

rank = int(os.environ["RANK"])
collectives.start(torch.device("cpu"))
with watchdog(report, Pace(interval=0.1, silence=SILENCE, suspicion=1.0, grace=0.5)):
    collectives.barrier()
    print("ready", flush=True)
    exec(sys.argv[1])
collectives.stop()
print(signal.getsignal(signal.SIGTERM).name)
"""


@dataclass
class Ended:
    """Of each process the exit code, and what all have printed, in its order."""

    codes: list[int]
    lines: list[str]


@contextlib.contextmanager
def processes(
    work: list[str], tmp_path: Path, silence: float = 60.0, store: TCPStore | int | None = None, stderr: int = 0
) -> Iterator[list[subprocess.Popen[str]]]:
    """A process for each piece of work.

    Args:
        store: by which they find each other, hosted by this process as by torchrun, or the port of one; without it, by
            that of rank 0.
        stderr: instead of a file.
    """
    port = free_port() if store is None else store if isinstance(store, int) else store.port
    shared = {"WORLD_SIZE": str(len(work)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **shared, "TORCH_CPP_LOG_LEVEL": "FATAL"}
    if store is not None:
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    program = PROGRAM.replace("SILENCE", str(silence))
    with (tmp_path / "printed").open("wb") as printed:
        begun = [
            subprocess.Popen(
                [sys.executable, "-c", program, line],
                env=environment | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=stderr or printed,
                text=True,
            )
            for rank, line in enumerate(work)
        ]
        try:
            for process in begun:
                assert process.stdout is not None and process.stdout.readline() == "ready\n", printed_in(tmp_path)
            yield begun
        finally:
            for process in begun:
                process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()


def printed_in(tmp_path: Path) -> list[str]:
    return (tmp_path / "printed").read_text(encoding="utf-8").splitlines()


def end_of(begun: list[subprocess.Popen[str]], tmp_path: Path) -> Ended:
    """Wait for all: they must end by themselves."""
    return Ended([process.wait(timeout=120) for process in begun], printed_in(tmp_path))


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


BARRIER, SLEEP = "collectives.barrier()", "time.sleep(600)"


def test_the_true_error_is_on_top(tmp_path: Path, store: TCPStore) -> None:
    """One waits for the failed process in a collective, one does something else: both end and say why."""
    with processes([BARRIER, "raise UserError('the disk is full')", SLEEP], tmp_path, store=store) as begun:
        ended = end_of(begun, tmp_path)
    assert ended.codes == [1, 2, 1]
    assert ended.lines[0] == "process 1: error: the disk is full"
    why = "ended because process 1 failed: the disk is full"
    assert sorted(ended.lines[1:]) == [f"process 0: {why}", f"process 2: {why}"]


def test_the_process_that_hosts_the_store_fails(tmp_path: Path) -> None:
    """Without an agent of torchrun it is that of rank 0, and ends with it: not before the others have read why."""
    with processes(["raise UserError('the disk is full')", BARRIER, SLEEP], tmp_path) as begun:
        ended = end_of(begun, tmp_path)
    assert ended.codes == [2, 1, 1]
    assert ended.lines[0] == "process 0: error: the disk is full"
    assert all(line.endswith("ended because process 0 failed: the disk is full") for line in ended.lines[1:])


@pytest.mark.slow
def test_the_store_is_gone(tmp_path: Path) -> None:
    """Nobody would notice a failure any more; a process that comes to its end before, does."""
    with processes([SLEEP, SLEEP, "time.sleep(1)"], tmp_path, silence=5.0) as begun:
        begun[0].send_signal(signal.SIGKILL)
        ended = end_of(begun, tmp_path)
    assert ended.codes == [-signal.SIGKILL, 1, 0]
    assert ended.lines == [
        "process 1: ended because process 0 does not answer any more: it was ended, or its machine has failed"
    ]


def test_the_same_error_everywhere_is_printed_once(tmp_path: Path, store: TCPStore) -> None:
    with processes(["raise UserError('no such file')"] * 3, tmp_path, store=store) as begun:
        ended = end_of(begun, tmp_path)
    assert ended.codes == [2, 2, 2]
    assert len(ended.lines) == 1 and ended.lines[0].endswith("error: no such file")


def test_a_killed_process_is_named(tmp_path: Path, store: TCPStore) -> None:
    """It can say nothing. What the collective of the second says of it is not the true error."""
    with processes([SLEEP, BARRIER, SLEEP], tmp_path, silence=5.0, store=store) as begun:
        begun[0].send_signal(signal.SIGKILL)
        ended = end_of(begun, tmp_path)
    assert ended.codes == [-signal.SIGKILL, 1, 1]
    why = "ended because process 0 failed: it is gone"
    assert len(ended.lines) == 2
    assert all(line.startswith(f"process {rank}: {why}") for rank, line in enumerate(sorted(ended.lines), start=1))


@pytest.mark.slow
def test_a_heart_that_is_silent(tmp_path: Path, store: TCPStore) -> None:
    """A machine that is gone closes no connection: only its silence tells. As if suspended, and never again awake."""
    with processes([SLEEP, BARRIER], tmp_path, silence=2.0, store=store) as begun:
        begun[0].send_signal(signal.SIGSTOP)
        assert begun[1].wait(timeout=120) == 1
    assert printed_in(tmp_path)[0].startswith("process 1: ended because process 0 failed: it is gone")


@pytest.mark.slow
def test_a_second_signal_ends_what_waits_in_a_collective(tmp_path: Path, store: TCPStore) -> None:
    """There the main thread hears nothing. The first one is to end the training between two micro-batches."""
    noted = "signal.signal(signal.SIGUSR1, lambda *_: None); print('noted', flush=True); "
    with processes([noted + BARRIER, SLEEP], tmp_path, store=store) as begun:
        assert begun[0].stdout is not None and begun[0].stdout.readline() == "noted\n"
        deadline = time.monotonic() + 120
        while begun[0].poll() is None:
            begun[0].send_signal(signal.SIGUSR1)
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert begun[0].returncode == 128 + signal.SIGUSR1


def test_before_the_training_one_signal_ends_it(tmp_path: Path, store: TCPStore) -> None:
    """As it does without other processes, whose preparations this one waits for."""
    with processes([BARRIER, SLEEP], tmp_path, store=store) as begun:
        begun[0].send_signal(signal.SIGTERM)
        assert begun[0].wait(timeout=120) == 128 + signal.SIGTERM


HEARS_CHILDREN = "signal.signal(signal.SIGCHLD, lambda *_: None)\n"  # as the loaders of torch do


@pytest.mark.parametrize(
    "children",
    [
        "for _ in range(10): subprocess.run(['true']); time.sleep(0.3)",
        "for _ in range(1000): os.kill(os.getpid(), signal.SIGCHLD); time.sleep(0.002)",
        "signal.signal(signal.SIGUSR1, lambda *_: None); os.kill(os.getpid(), signal.SIGUSR1)\n"
        "for _ in range(6): time.sleep(0.6); subprocess.run(['true'])",
    ],
    ids=["some", "many", "in a stop"],
)
def test_children_that_end_are_no_signals(children: str, tmp_path: Path, store: TCPStore) -> None:
    """Compilers, git, loaders: nobody is to stop for them, nor to think less time has passed than has."""
    with processes([HEARS_CHILDREN + children, "time.sleep(1)"] * 2, tmp_path, store=store) as begun:
        ended = end_of(begun, tmp_path)
    assert ended.codes == [0] * 4 and ended.lines == []


def test_the_store_does_not_answer(tmp_path: Path) -> None:
    """The machine that hosts it is gone, and has closed no connection: a request to it would wait for ever."""
    hosted = "store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)"
    program = f"from torch.distributed import TCPStore; {hosted}; print(store.port, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as host:
        try:
            assert host.stdout is not None
            go, port = tmp_path / "go", int(host.stdout.readline())
            is_done = f"while not os.path.exists({str(go)!r}): time.sleep(0.1)"
            fails = f"{is_done}\nraise UserError('the disk is full')"
            with processes([SLEEP, BARRIER, is_done, fails], tmp_path, silence=15.0, store=port) as begun:
                host.send_signal(signal.SIGSTOP)
                go.touch()
                ended = end_of(begun, tmp_path)
        finally:
            host.kill()
    assert ended.codes == [1, 1, 0, 2]
    assert "process 3: error: the disk is full" in ended.lines
    why = "ended because the launcher on 127.0.0.1 does not answer any more"
    assert sum(line.startswith(f"process {rank}: {why}") for line in ended.lines for rank in (0, 1)) == 2


@pytest.mark.parametrize("failing", [0, 1])
def test_nobody_reads_what_is_printed(failing: int, tmp_path: Path, store: TCPStore) -> None:
    """The terminal is closed: what cannot be said is no reason to live on."""
    read, write = os.pipe()
    os.close(read)
    work = [SLEEP, SLEEP]
    work[failing] = "raise UserError('the disk is full')"
    try:
        with processes(work, tmp_path, store=store, stderr=write) as begun:
            ended = end_of(begun, tmp_path)
    finally:
        os.close(write)
    assert ended.codes[failing] == 2 and ended.codes[1 - failing] == 1


def test_nobody_reads_and_the_pipe_is_full(tmp_path: Path, store: TCPStore) -> None:
    """As with a pager that waits: writing would wait for ever."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    while select.select([], [write], [], 0)[1]:
        os.write(write, b"x" * 4096)
    os.set_blocking(write, True)
    try:
        with processes(["raise UserError('the disk is full')", SLEEP], tmp_path, store=store, stderr=write) as begun:
            ended = end_of(begun, tmp_path)
    finally:
        os.close(read)
        os.close(write)
    assert ended.codes == [2, 1]


@pytest.mark.slow
def test_all_of_them_may_be_suspended(tmp_path: Path, store: TCPStore) -> None:
    """A laptop that sleeps: on waking nobody takes the others for dead."""
    with processes(["time.sleep(1); collectives.barrier()"] * 2, tmp_path, silence=1.0, store=store) as begun:
        for process in begun:
            process.send_signal(signal.SIGSTOP)
        with pytest.raises(subprocess.TimeoutExpired):
            begun[0].wait(timeout=3)
        for process in begun:
            process.send_signal(signal.SIGCONT)
        ended = end_of(begun, tmp_path)
    assert ended.codes == [0, 0] and ended.lines == []


def test_the_end_without_an_error(tmp_path: Path, store: TCPStore) -> None:
    """One is done long before the other. Signals are handled as before, and those ignored that a stop ignores: a
    launcher sends them to the others as soon as the first one has ended."""
    stopped = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    with processes([stopped, "time.sleep(3)"], tmp_path, silence=1.0, store=store) as begun:
        ended = end_of(begun, tmp_path)
        handlers = [process.stdout.read() for process in begun if process.stdout]
    assert ended.codes == [0, 0] and ended.lines == []
    assert handlers == ["SIG_IGN\n", "SIG_DFL\n"]
