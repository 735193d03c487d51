"""What can be compared of a run, and whether more of it is better."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.ledger import Entry

DEFAULT = "val/bpb"
_MAIN = {DEFAULT, "core/mean", "chat/mean"}
_STANDARD_ERROR = re.compile(r"_stderr(_|/|$)")
_MORE = re.compile(
    r"^(evaluate/|best\.)?(core|chat|chatcore|harness)/|^(best\.)?pass_at_\d+/|pass@|accuracy|reward|_per_second$|/mfu$|centered"
)
_LESS = re.compile(r"bpb|loss|seconds$|_ms$|_bytes|bytes_|memory|perplexity")


def more_is_better(metric: str) -> bool | None:
    """Of bits per byte, losses and times less is better, of accuracies and speeds more; None: not known."""
    return True if _MORE.search(metric) else False if _LESS.search(metric) else None


def metrics_of(entry: Entry) -> dict[str, float]:
    """Quality and cost by name: the metrics, ``best.…``, ``inference.…``, ``seconds``, ``tokens``, ``flops``."""
    costs = {"seconds": entry.seconds, "tokens": entry.tokens, "flops": entry.flops}
    inference = {f"inference.{name}": value for name, value in entry.inference.items()}
    best = {f"best.{name}": value for name, value in entry.best.items()}
    return {**entry.metrics, **best, **inference, **costs}


def main_metrics(metrics: Iterable[str]) -> list[str]:
    """Those that a stage is trained for, in the order given: bits per byte, CORE, the chat tasks' mean, pass@1."""
    return [name for name in metrics if name in _MAIN or name.startswith("pass_at_1/")]


def require_known(metrics: Iterable[str], found: Iterable[str], key: str = "metrics") -> None:
    """Raise :class:`UserError` for metrics that no run has. ``key``: the setting that named them."""
    valid = [name for name in found if not _STANDARD_ERROR.search(name)]
    if problems := [
        f"{key}={name}: no run has it; {did_you_mean(name, valid)}" for name in metrics if name not in valid
    ]:
        raise UserError(problems, f"There are: {', '.join(sorted(valid))}.")
