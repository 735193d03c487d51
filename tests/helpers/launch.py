"""Starts commands on several processes, as a person does with torchrun; nothing of it outlives the test."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.forked import Forked, running

TIMEOUT = 300.0  # seconds; a tiny training takes ten, on a machine at work several times that
MARK = "NANOCHAT_PL_TEST_LAUNCH"  # in the environment of all processes of a launch


@dataclass
class Launched:
    """The agents of torchrun, one a node, with what they and their workers have printed.

    Attributes:
        agents: one a node.
        mark: stands in the environment of each of the processes.
    """

    agents: list[Forked]
    mark: str

    def wait(self, timeout: float = TIMEOUT) -> list[subprocess.CompletedProcess[str]]:
        """Wait for all agents; gives exit code, stdout and stderr of each."""
        deadline = time.monotonic() + timeout
        try:
            codes = [agent.wait(max(deadline - time.monotonic(), 0.1)) for agent in self.agents]
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"still at work after {timeout:.0f} s:\n{self.printed()}") from error
        return [
            subprocess.CompletedProcess(agent.args, code, *agent.printed())
            for agent, code in zip(self.agents, codes, strict=True)
        ]

    def printed(self) -> str:
        """All that was printed so far."""
        return "\n".join(text for agent in self.agents for text in agent.printed())

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
    run = Launched([], mark)
    try:
        for number, count in enumerate(of_nodes):
            command = [
                *("-m", "torch.distributed.run", f"--nproc-per-node={count}"),
                *(f"--nnodes={len(of_nodes)}", f"--node-rank={number}"),
                *("--master-addr=127.0.0.1", f"--master-port={port}", "-m", module, *arguments),
            ]
            run.agents.append(Forked(command, capture=True, env=environment, cwd=cwd))
        yield run
    finally:
        run.kill()


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


def torchrun(processes: int, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A real start of torchrun and its workers, which takes half a minute."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with subprocess.Popen(
        [*command, "-m", "nanochat_pl.cli.main", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as agent:
        try:
            out, err = agent.communicate(timeout=TIMEOUT)
        finally:
            agent.terminate()  # it ends its workers
    return subprocess.CompletedProcess(agent.args, agent.returncode, out, err)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
