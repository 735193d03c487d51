"""Starts commands on several processes, as a person does with torchrun; nothing of it outlives the test."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tests.helpers.forked import Forked, running

TIMEOUT = 300.0  # seconds; a tiny training takes ten, on a machine at work several times that
MARK = "NANOCHAT_PL_TEST_LAUNCH"  # in the environment of all processes of a launch


@dataclass
class Launched:
    """The agents of torchrun, one a node, with what they and their workers have printed.

    Attributes:
        agents: one a node.
        mark: stands in the environment of each of the processes.
        module: the program of the workers.
    """

    agents: list[Forked]
    mark: str
    streams: list[tuple[TextIO, TextIO]]
    module: str

    def wait(self, timeout: float = TIMEOUT) -> list[subprocess.CompletedProcess[str]]:
        """Wait for all agents; gives exit code, stdout and stderr of each."""
        deadline = time.monotonic() + timeout
        try:
            codes = [agent.wait(max(deadline - time.monotonic(), 0.1)) for agent in self.agents]
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"still at work after {timeout:.0f} s:\n{self.printed()}") from error
        return [
            subprocess.CompletedProcess(agent.args, code, _read(out), _read(err))
            for agent, code, (out, err) in zip(self.agents, codes, self.streams, strict=True)
        ]

    def printed(self) -> str:
        """All that was printed so far."""
        return "\n".join(_read(stream) for streams in self.streams for stream in streams)

    def workers(self) -> dict[int, int]:
        """The processes that train, by their rank: their ids."""
        marked = {pid: of["env"] for pid, of in running().items() if of["env"].get(MARK) == self.mark}
        return {int(env["RANK"]): pid for pid, env in marked.items() if "RANK" in env}

    def kill(self) -> None:
        """End all of them: agents, workers, and what these have started."""
        for pid, of in running().items():
            if of["env"].get(MARK) == self.mark:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)


@contextlib.contextmanager
def launched(
    processes: int | Sequence[int],
    arguments: Sequence[str],
    env: Mapping[str, str] | None = None,
    nodes: int = 1,
    cwd: Path | None = None,
    module: str = "nanochat_pl.cli.main",
) -> Iterator[Launched]:
    """``torchrun … -m nanochat_pl.cli.main ARGUMENTS``, as long as the block lasts; agents and workers are copies.

    Args:
        processes: of each node; a sequence, where they differ: one node for each.
        arguments: of ``nanochat-pl``, the command first.
        env: on top of today's environment.
        nodes: agents of torchrun, all on this machine.
        cwd: folder in which they run.
        module: another program to start.
    """
    of_nodes = [processes] * nodes if isinstance(processes, int) else list(processes)
    mark, port = uuid.uuid4().hex, free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {}), MARK: mark}
    with contextlib.ExitStack() as stack:
        streams = [(stack.enter_context(_file()), stack.enter_context(_file())) for _ in of_nodes]
        run = Launched([], mark, streams, module)
        stack.callback(run.kill)
        for number, count in enumerate(of_nodes):
            command = [
                *("-m", "torch.distributed.run", f"--nproc-per-node={count}"),
                *(f"--nnodes={len(of_nodes)}", f"--node-rank={number}"),
                *("--master-addr=127.0.0.1", f"--master-port={port}", "-m", module, *arguments),
            ]
            out, err = streams[number]
            run.agents.append(Forked(command, stdout=out, stderr=err, env=environment, cwd=cwd))
        yield run


def launch(
    processes: int | Sequence[int],
    arguments: Sequence[str],
    env: Mapping[str, str] | None = None,
    nodes: int = 1,
    cwd: Path | None = None,
    timeout: float = TIMEOUT,
    module: str = "nanochat_pl.cli.main",
) -> subprocess.CompletedProcess[str]:
    """As :func:`launched`, and wait for it: the largest exit code, and what all nodes have printed."""
    with launched(processes, arguments, env, nodes, cwd, module) as run:
        ended = run.wait(timeout)
    return subprocess.CompletedProcess(
        ended[0].args,
        max(abs(each.returncode) for each in ended),
        "".join(each.stdout for each in ended),
        "".join(each.stderr for each in ended),
    )


def _file() -> TextIO:
    # Not a pipe: nobody has to read it while they run, and it is still there when they are killed.
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def _read(stream: TextIO) -> str:
    # By another description of the file: the writers share the position of this one.
    return Path(f"/proc/self/fd/{stream.fileno()}").read_text(encoding="utf-8", errors="replace")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
