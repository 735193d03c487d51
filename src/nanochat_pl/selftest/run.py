"""What a machine is made to prove before it is trusted with a training: the runner of the checks, and their table.

Every process makes all checks in the same order. After each, the processes tell each other what they found, so a
failure of one is named in the table of the first. A check that gets no answer (a network that lets nothing through, a
process that is gone) ends the process with the name of the check, long before any patience of the backend.
"""

from __future__ import annotations

import contextlib
import json
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
from nanochat_pl.selftest import collective_checks as selftest_processes
from nanochat_pl.selftest import device_checks
from nanochat_pl.selftest.checks import Bench, Check, Finding
from nanochat_pl.training.device import own_device, require_own_gpus


class CheckBroke(UserError):
    """A check in which the processes speak to each other raised an error in one of them: the others wait for it."""


def selftest(accelerator: str, runs: Path, caches: Path, timeout_seconds: float) -> list[Finding]:
    """Make all checks on this process's device, together with the processes that were started with it.

    Args:
        accelerator: the setting: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        runs, caches: folders of the runs and of the data caches.
        timeout_seconds: for a check.

    Returns:
        the lines of the table, the same on all processes.

    Raises:
        SharedError: there is no such device on one of them.
        CheckBroke: a check with collectives raised in this process.
    """
    device = coordination.raise_on_all_ranks(lambda: own_device(accelerator))
    require_own_gpus(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bench = Bench(device, choose_compute_dtype("auto", device), accelerator, runs, caches)
    with selftest_processes.make_checks() as checks:
        return run_checks([*device_checks.CHECKS, *checks], bench, timeout_seconds)


def run_checks(checks: Sequence[Check], bench: Bench, timeout_seconds: float) -> list[Finding]:
    """Make all checks on all processes; gives the lines of the table, the same on each.

    Raises:
        CheckBroke: a check with collectives raised in this process.
    """
    findings: list[Finding] = []
    for check in checks:
        with no_answer_ends(check.name, timeout_seconds):
            own = _findings_of(check, bench)
            everyones = [
                [Finding(*line) for line in json.loads(text)] for text in collectives.all_gather_str(json.dumps(own))
            ]
        findings += _merged(everyones)
    return findings


def _findings_of(check: Check, bench: Bench) -> list[Finding]:
    try:
        return list(check.function(bench))
    except Exception as error:  # whatever a broken device, driver or library makes of it: that is the finding
        lines = str(error).strip().splitlines() or [""]
        said = f"{type(error).__name__}: {lines[0][:300]}"
        if check.together and collectives.world_size() > 1:
            raise CheckBroke(f"{check.name}: {said}") from error
        return [Finding(check.name, "FAILED", said)]


def _merged(everyones: Sequence[Sequence[Finding]]) -> list[Finding]:
    """The lines of one check: the first process's figure, or who failed and how."""
    merged = []
    for name in dict.fromkeys(finding.check for own in everyones for finding in own):
        by_rank = [(rank, f) for rank, own in enumerate(everyones) for f in own if f.check == name]
        failed = [(rank, finding) for rank, finding in by_rank if finding.result == "FAILED"]
        shown = by_rank[0][1]
        if failed and len(everyones) > 1:
            figures = "; ".join(f"process {rank}: {finding.figure}" for rank, finding in failed)
            shown = failed[0][1]._replace(figure=figures)
        merged.append(shown)
    return merged


def verdict(findings: Sequence[Finding]) -> str:
    """The last line: whether all is well, else what is not."""
    failed = [finding.check for finding in findings if finding.result == "FAILED"]
    left_out = [finding.check for finding in findings if finding.result == "left out"]
    rest = f" ({len(left_out)} left out: {', '.join(left_out)})" if left_out else ""
    if failed:
        return f"{len(failed)} of {len(findings) - len(left_out)} checks FAILED: {', '.join(failed)}{rest}"
    return f"all {len(findings) - len(left_out)} checks passed{rest}"


@contextlib.contextmanager
def no_answer_ends(what: str, seconds: float) -> Iterator[None]:
    """End this process, saying so, where the block takes longer: it waits for what does not come."""

    def end() -> None:
        place = launch_env()
        fix = (
            "Another process is gone or in another check, or the network lets nothing through: see its lines, try"
            " NCCL_DEBUG=INFO, and NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME set to the right interface."
        )
        if place.world_size == 1:
            fix = "On a busy machine it may need longer: timeout_seconds=600."
        print(
            f"\nprocess {place.rank} of {place.world_size}: {what}: no answer in {seconds:,.0f} s.\n{fix}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
