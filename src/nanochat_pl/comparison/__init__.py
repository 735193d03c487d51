"""What runs of the ledger show of each other: differences over seeds with their noise, and laws of scaling."""

from nanochat_pl.comparison.compare import Comparison, MetricComparison, Row, compare
from nanochat_pl.comparison.groups import Group, Run, by_name, by_setting, keep, read_runs
from nanochat_pl.comparison.neighbours import neighbours

__all__ = [
    "Comparison",
    "Group",
    "MetricComparison",
    "Row",
    "Run",
    "by_name",
    "by_setting",
    "compare",
    "keep",
    "neighbours",
    "read_runs",
]
