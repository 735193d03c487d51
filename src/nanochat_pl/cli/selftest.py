"""Proves a machine in a minute: devices, arithmetic, collectives, sharded optimizer, resume files.

nanochat-pl selftest
torchrun --nproc-per-node 8 -m nanochat_pl.cli.main selftest
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_pl.cli.run_record import what_runs
from nanochat_pl.common.console import print_table, rank_zero_print
from nanochat_pl.common.device_settings import Accelerator
from nanochat_pl.common.files import write_json
from nanochat_pl.common.imports import loading_libraries
from nanochat_pl.common.paths import PathsSettings, cache_folder
from nanochat_pl.common.schema import UserPath, setting
from nanochat_pl.config.compose import compose
from nanochat_pl.distributed import coordination


@dataclass(frozen=True)
class SelftestConfig:
    """The root of configs/selftest.yaml."""

    accelerator: Accelerator = setting("auto", "Device to test; auto: the best there is.")
    to: UserPath | None = setting(None, "A file for the table, as JSON; null: none.")
    timeout_seconds: float = setting(120.0, "Seconds for a check; longer means that it never ends.", above=0)
    paths: PathsSettings = setting(factory=PathsSettings)


Config = SelftestConfig


def run(arguments: Sequence[str]) -> int:
    """The command."""
    config = coordination.raise_on_all_ranks(lambda: compose("selftest", SelftestConfig, arguments)).config
    with loading_libraries():
        from nanochat_pl.distributed import collectives
        from nanochat_pl.selftest.run import selftest, verdict
    size = collectives.world_size()
    rank_zero_print(f"Testing {size} process{'es' if size > 1 else ''} …")
    runs, caches = Path(config.paths.runs), cache_folder(config.paths)
    software = ", ".join(f"{name} {version}" for name, version in what_runs().items())
    findings = selftest(config.accelerator, runs, caches, software, config.timeout_seconds)
    passed = all(finding.result != "FAILED" for finding in findings)
    print_table(("check", "result", "metric", "tolerance"), findings)
    if config.to is not None and collectives.is_rank_zero():
        write_json(Path(config.to), {"passed": passed, "checks": [finding._asdict() for finding in findings]})
    rank_zero_print(verdict(findings))
    return 0 if passed else 1
