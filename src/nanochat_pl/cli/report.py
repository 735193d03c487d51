"""Writes tables and plots of a run: report.md, one self-contained report.html, report.json.

nanochat-pl report run=demo
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_pl.cli._choose_runs import comparisons_of
from nanochat_pl.cli._subprocess import is_child
from nanochat_pl.common.console import print_table, rank_zero_print
from nanochat_pl.common.paths import PathsSettings, only_run
from nanochat_pl.common.run_dir import check_name
from nanochat_pl.common.schema import setting
from nanochat_pl.config.experiment import compose_step
from nanochat_pl.report import SUMMARY_COLUMNS, summary_table, write_report


@dataclass(frozen=True)
class ReportConfig:
    """The root of configs/report.yaml."""

    run: str | None = setting(None, "Name of the run; null: the only one there is.")
    paths: PathsSettings = setting(factory=PathsSettings)


Config = ReportConfig


def run(arguments: Sequence[str]) -> int:
    """The command."""
    composed = compose_step("report", "report", ReportConfig, arguments)
    runs = Path(composed.config.paths.runs)
    name = composed.config.run or composed.experiment or only_run(runs)
    check_name(name)
    report = write_report(runs / name, comparisons_of(runs, name))
    if not is_child():
        print_table(SUMMARY_COLUMNS, summary_table(runs / name), title=f"run {name}")
    rank_zero_print(f"report: {report}")
    return 0
