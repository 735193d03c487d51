"""Starts a command on several devices of this machine: one process for each, through torch.distributed.run.

It is what ``torchrun --standalone --nproc-per-node N -m nanochat_pl.cli.main …`` does, in this process: so the command
ends with the exit code of its processes, and prints what they print and nothing besides.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from nanochat_pl.cli._subprocess import EXIT_CODES, FOLLOW_PARENT, LAUNCHED, is_child
from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.constants import STOP_SIGNALS
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.launch_env import launch_env, usable_cpus
from nanochat_pl.common.signals import heeded_signals

# What processes that were asked to stop have to write their resume file, in seconds; then they are killed.
SHUTDOWN_SECONDS = 600


def processes_to_start(accelerator: str, devices: int | Literal["auto"], num_nodes: int = 1, prefix: str = "") -> int:
    """How many processes this command has to start for the devices that were asked for; 1: none, this one does it.

    Says which devices stay idle.

    Args:
        accelerator, devices, num_nodes: the settings.
        prefix: of their keys, for messages.

    Raises:
        UserError: there are not so many devices; a launcher has started another number; several machines without one.
    """
    place = launch_env()
    if place.world_size > 1 or _is_launched():
        _require_as_launched(devices, num_nodes, prefix)
        return 1
    if num_nodes > 1:
        each = 8 if devices == "auto" else devices
        raise UserError(
            f"{prefix}num_nodes={num_nodes}: one process cannot start another machine's; a launcher does.",
            fix=f"On each machine: torchrun --nnodes {num_nodes} --node-rank N --master-addr HOST --master-port 29500"
            f" --nproc-per-node {each} -m nanochat_pl.cli.main train …; or, with Slurm:"
            f" sbatch --nodes {num_nodes} docs/nanochat.sbatch train …",
        )
    from nanochat_pl.common.device import choose_device, num_devices  # with torch: the settings are checked before

    device = choose_device(accelerator, f"{prefix}accelerator")
    wanted, there = (num_devices(each, device, f"{prefix}devices") for each in (devices, "auto"))
    if wanted < there:
        rank_zero_print(f"{prefix}devices={wanted}: {there - wanted} of the machine's {there} GPUs stay idle.")
    return wanted


def _is_launched() -> bool:
    """Whether torchrun or Slurm has started this process, alone or as one of several that do not know each other."""
    steps = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    return "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE"} <= {*os.environ} or steps != "1"


def _require_as_launched(devices: int | Literal["auto"], num_nodes: int, prefix: str) -> None:
    place = launch_env()
    if devices not in ("auto", place.local_world_size):
        raise UserError(
            f"{prefix}devices={devices}: the launcher has started {place.local_world_size} processes on this machine.",
            fix=f"Leave {prefix}devices out: under a launcher, its number holds.",
        )
    nodes = -(-place.world_size // place.local_world_size)
    if num_nodes not in (1, nodes):
        raise UserError(
            f"{prefix}num_nodes={num_nodes}: the launcher has started processes on {nodes} machine"
            f"{'s' if nodes > 1 else ''}.",
            fix=f"Leave {prefix}num_nodes out: under a launcher, its number holds.",
        )


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Run ``nanochat-pl ARGUMENTS`` as so many processes of this machine, and wait for them.

    A signal is passed on to all of them, each may then write what it has to; a second one ends them at once.

    Returns:
        0; else the exit code of the process that failed first, or 128 + n where signal n ended it, or us.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    def stop(number: int, frame: Any) -> None:
        raise SignalException(f"signal {number}", sigval=signal.Signals(number))

    previous = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    before = dict(os.environ)
    # Each process says what is wrong with it; the launcher's log would repeat it.
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as codes:
        try:
            os.environ |= _environment(num_processes) | {EXIT_CODES: codes}
            config = _config(num_processes)
            for signum in heeded_signals():  # an older launcher does not know all of them
                signal.signal(signum, stop)
            sys.stdout.flush()
            elastic_launch(config, sys.executable)("-m", "nanochat_pl.cli.main", *arguments)
        except SignalException as stopped:
            return _failed_stop(Path(codes)) or 128 + int(stopped.sigval)
        except ChildFailedError as error:
            return _exit_code(error)
        finally:
            logging.disable(logging.NOTSET)
            os.environ.clear()
            os.environ |= before
            for signum, handler in previous.items():
                signal.signal(signum, handler)
    return 0


def _environment(num_processes: int) -> dict[str, str]:
    threads = str(max(1, usable_cpus() // num_processes))
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        # They end with the launcher, and leave the closing words to whoever has started it.
        **({FOLLOW_PARENT: LAUNCHED} if is_child() else {}),
    }


def _config(num_processes: int) -> Any:
    from torch.distributed.launcher.api import LaunchConfig

    wanted: dict[str, Any] = {
        "min_nodes": 1,
        "max_nodes": 1,
        "nproc_per_node": num_processes,
        "run_id": uuid.uuid4().hex,
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
        "rdzv_configs": {"timeout": 900},
        "max_restarts": 0,
        "local_addr": "localhost",
        "signals_to_handle": ",".join(signum.name for signum in heeded_signals()),
        "shutdown_timeout": SHUTDOWN_SECONDS,
    }
    known = {field.name for field in dataclasses.fields(LaunchConfig)}  # the last two are younger than torch 2.9
    return LaunchConfig(**{name: value for name, value in wanted.items() if name in known})


def _failed_stop(codes: Path) -> int:
    """The exit code of a process that failed when it was to stop, as of a full disk; 0: all have stopped."""
    told = [int(path.read_text(encoding="utf-8") or 0) for path in sorted(codes.iterdir())]
    return next((code for code in told if 0 < code < 128), 0)


def _exit_code(error: Any) -> int:
    rank, failure = error.get_first_failure()
    code = int(failure.exitcode)
    if code >= 0:
        return code
    print(f"error: process {rank} was ended by signal {-code} ({signal.Signals(-code).name}).", file=sys.stderr)
    return 128 - code
