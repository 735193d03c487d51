"""Run the checks of the self-test on all processes, and make one table of what they find.

Every process makes all checks in the same order. After each, the processes tell each other what they found, so a
failure of one is named in the table of the first. A check that gets no answer (a network that lets nothing through, a
process that is gone) ends the process with the name of the check, long before any timeout of the backend.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from nanochat_pl.common.device import choose_compute_dtype
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.launch_env import launch_env
from nanochat_pl.distributed import collectives, coordination
from nanochat_pl.selftest import checks, collective_checks
from nanochat_pl.selftest.checks import Check, Finding, Setup
from nanochat_pl.training.device import own_device, require_own_gpus


def selftest(accelerator: str, runs: Path, caches: Path, software: str, timeout_seconds: float) -> list[Finding]:
    """Make all checks on this process's device, together with the processes that were started with it.

    Args:
        accelerator: the setting: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        runs, caches: folders of the runs and of the data caches.
        software: what has to be the same in all processes.
        timeout_seconds: for a check.

    Returns:
        the lines of the table, the same on all processes.

    Raises:
        SharedError: there is no such device on one of them.
        UserError: a check with collectives raised in this process, and others wait for it.
    """
    device = coordination.raise_on_all_ranks(lambda: own_device(accelerator))
    require_own_gpus(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    setup = Setup(device, choose_compute_dtype("auto", device), accelerator, runs, caches, software)
    return run_checks([*checks.CHECKS, *collective_checks.CHECKS], setup, timeout_seconds)


def run_checks(to_make: Sequence[Check], setup: Setup, timeout_seconds: float) -> list[Finding]:
    """Make checks on all processes; gives the lines of the table, the same on each."""
    findings: list[Finding] = []
    for check in to_make:
        with end_without_answer(check.name, timeout_seconds):
            everyones = collectives.all_gather_plain(_findings_of(check, setup))
        findings += _merged([[Finding(*line) for line in lines] for lines in everyones])
    return findings


def _findings_of(check: Check, setup: Setup) -> list[Finding]:
    try:
        return list(check.function(setup))
    except Exception as error:  # whatever a broken device, driver or library makes of it: that is the finding
        said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
        if check.has_collectives and collectives.world_size() > 1:
            raise UserError(f"{check.name}: {said}") from error
        return [Finding(check.name, "FAILED", said)]


def _merged(everyones: Sequence[Sequence[Finding]]) -> list[Finding]:
    """The lines of one check: the first process's metric, or who failed and how."""
    merged: dict[str, Finding] = {}
    for own in everyones:
        for finding in own:
            merged.setdefault(finding.check, finding)
    for name in merged if len(everyones) > 1 else ():
        failed = [
            (rank, finding)
            for rank, own in enumerate(everyones)
            for finding in own
            if finding.check == name and finding.result == "FAILED"
        ]
        if failed:
            metrics = "; ".join(f"process {rank}: {finding.metric}" for rank, finding in failed)
            merged[name] = failed[0][1]._replace(metric=metrics)
    return list(merged.values())


def verdict(findings: Sequence[Finding]) -> str:
    """The last line: whether all is well, else what is not."""
    failed = [finding.check for finding in findings if finding.result == "FAILED"]
    left_out = [finding.check for finding in findings if finding.result == "left out"]
    rest = f" ({len(left_out)} left out: {', '.join(left_out)})" if left_out else ""
    if failed:
        return f"{len(failed)} of {len(findings) - len(left_out)} checks FAILED: {', '.join(failed)}{rest}"
    return f"all {len(findings) - len(left_out)} checks passed{rest}"


@contextlib.contextmanager
def end_without_answer(what: str, seconds: float) -> Iterator[None]:
    """End this process, saying so, where the block takes longer: it waits for what does not come."""
    env = launch_env()
    fix = (
        "Another process is gone or in another check, or the network lets nothing through: see its lines, try"
        " NCCL_DEBUG=INFO, and NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME set to the right interface."
        if env.world_size > 1
        else "On a busy machine it may need longer: timeout_seconds=600."
    )
    message = f"\nprocess {env.rank} of {env.world_size}: {what}: no answer in {seconds:,.0f} s.\n{fix}"

    def end() -> None:
        print(message, file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
