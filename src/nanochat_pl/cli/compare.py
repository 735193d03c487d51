"""Compares groups of runs that differ in their seed: intervals, verdicts in words, and how many seeds would be needed.

nanochat-pl compare 'd4-seed*' 'd4-plain-seed*'
nanochat-pl compare by=model.backout model.depth=4 'metrics=[val/bpb,seconds]' to=backout
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nanochat_pl.cli._choose_runs import ChoiceSettings, choose
from nanochat_pl.common.console import print_table, rank_zero_print
from nanochat_pl.common.schema import UserPath, setting
from nanochat_pl.comparison import Comparison, MetricComparison, by_name, by_setting, compare
from nanochat_pl.comparison.metrics import DEFAULT
from nanochat_pl.comparison.words import COLUMNS, cells, direction, what_it_holds
from nanochat_pl.report.comparison import write_comparison


@dataclass(frozen=True)
class CompareConfig(ChoiceSettings):
    """The root of configs/compare.yaml."""

    by: str | None = setting(
        None,
        "A setting whose values make the groups; null: each name is a group, a single one is split by its settings.",
    )
    metrics: list[str] = setting(
        factory=lambda: [DEFAULT],
        doc="What is compared: metrics of the training; seconds, tokens, flops, inference.NAME; evaluate/SUITE/NAME.",
    )
    sequential: bool = setting(
        False, "Intervals and verdicts that hold although one looks after every seed and stops when something is found."
    )
    to: UserPath | None = setting(None, "Folder for a page with curves: compare.html, .md, .json; null: none.")


Config = CompareConfig


def run(arguments: Sequence[str]) -> int:
    """The command."""
    config, stage, runs, remarks = choose(
        "compare", CompareConfig, arguments, lambda config: config.metrics, lambda config: config.by
    )
    chosen = by_name(runs, config.runs) if config.by is None and len(config.runs) > 1 else by_setting(runs, config.by)
    result = compare(stage, chosen.groups, config.metrics, sequential=config.sequential)
    result = replace(result, remarks=[*remarks, *chosen.remarks, *result.remarks])
    for metric in result.metrics:
        _print(metric, result)
    for remark in result.remarks:
        rank_zero_print(remark)
    if config.to is not None:
        page = write_comparison(Path(config.to), result, chosen.groups, Path(config.paths.runs))
        rank_zero_print(f"page: {page}")
    return 0


def _print(metric: MetricComparison, result: Comparison) -> None:
    print_table(
        COLUMNS, [cells(row) for row in metric.rows], title=f"{result.stage}, {metric.metric}{direction(metric)}"
    )
    if len(metric.rows) > 1:
        rank_zero_print(what_it_holds(metric, result))
    rank_zero_print()
