"""The Slurm batch file of the docs, with commands in Slurm's place that do what Slurm does with it on one node."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.conftest import tiny_overrides

SBATCH = Path(__file__).resolve().parents[2] / "docs" / "nanochat.sbatch"
TASKS = 2
SRUN = f"""#!{sys.executable}
import os, pathlib, subprocess, sys, time
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
size = {{"SLURM_NTASKS": "{TASKS}", "SLURM_STEP_TASKS_PER_NODE": "{TASKS}"}}
tasks = [
    subprocess.Popen(command, env={{**os.environ, **size, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}})
    for n in range({TASKS})
]
pathlib.Path("tasks").write_text(" ".join(str(task.pid) for task in tasks))
while any(task.poll() is None for task in tasks):
    if any(task.returncode for task in tasks) and "--kill-on-bad-exit=1" in sys.argv:
        for task in tasks:
            task.kill()
    time.sleep(0.01)
codes = [task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks]
print("codes", *codes, flush=True)
sys.exit(max(codes))
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> requeued; fi
"""
NANOCHAT_PL = f"""#!/bin/bash
exec {sys.executable} -m nanochat_pl.cli.main "$@"
"""


def test_it_is_a_script_of_bash_and_asks_slurm_for_what_it_needs() -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    text = SBATCH.read_text(encoding="utf-8")
    lines = text.splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--signal=USR1@120", "--requeue", "--open-mode=append"} <= set(asked)
    first_command = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(n < first_command for n, line in enumerate(lines) if line.startswith("#SBATCH")), "read up to there only"
    assert int(text.partition("STOPPED_BY_USR1=")[2][:3]) == 128 + signal.SIGUSR1
    assert "srun --kill-on-bad-exit=1 " in text


@contextlib.contextmanager
def batch_job(folder: Path, arguments: list[str], tasks: str = str(TASKS)) -> Iterator[subprocess.Popen[str]]:
    """The batch file as Slurm starts it; nothing of it outlives the block."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("nanochat-pl", NANOCHAT_PL)):
        (commands / name).write_text(text, encoding="utf-8")
        (commands / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(_free_port() - 20000),
        "SLURM_JOB_NODELIST": "node0",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_TASKS_PER_NODE": tasks,
    }
    job = subprocess.Popen(
        ["bash", str(SBATCH), *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield job
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def _free_port() -> int:
    """One of those that the batch file may choose."""
    for port in range(20000, 30000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def _steps(metrics: Path) -> int:
    return len(metrics.read_text(encoding="utf-8").splitlines()) - 2 if metrics.exists() else 0  # but for step 0


def test_nodes_with_different_numbers_of_tasks_are_refused(tmp_path: Path) -> None:
    with batch_job(tmp_path, ["train"], tasks="8(x2),4") as job:
        said, _ = job.communicate(timeout=60)
    assert job.returncode == 2 and "--ntasks-per-node" in said and not (tmp_path / "tasks").exists()


@pytest.mark.slow
def test_a_job_that_is_stopped_by_slurms_signal_goes_back_into_the_queue_and_goes_on(
    place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "runs" / "whole" / "tokenizer", tmp_path / "runs" / "slurm" / "tokenizer")
    own = [f"paths.runs={tmp_path / 'runs'}", "max_steps=40", "evaluation.every_steps=0"]
    arguments = ["train", "run=slurm", *tiny_overrides(place), *own]
    stage = tmp_path / "runs" / "slurm" / "base"
    with batch_job(tmp_path, arguments) as job:
        while _steps(stage / "metrics.csv") < 1:  # the first line; the next ones come seconds later
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.05)
        for pid in (tmp_path / "tasks").read_text(encoding="utf-8").split():
            os.kill(int(pid), signal.SIGUSR1)
        said, _ = job.communicate(timeout=240)
    assert job.returncode == 138 and re.search("codes (138 13[78]|137 138)", said), said
    assert (tmp_path / "requeued").read_text(encoding="utf-8").startswith("requeue ")
    assert not (stage / "finished.json").exists()
    with batch_job(tmp_path, arguments) as job:
        said, _ = job.communicate(timeout=240)
    assert job.returncode == 0 and "codes 0 0" in said and "going on after step" in said, said
    assert (stage / "finished.json").exists() and _steps(stage / "metrics.csv") == 40
    assert len((tmp_path / "requeued").read_text(encoding="utf-8").splitlines()) == 1
