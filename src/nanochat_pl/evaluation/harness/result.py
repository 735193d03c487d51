"""What lm-evaluation-harness found on a task, as a :class:`TaskResult`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.evaluation.results import TaskResult, make_result

if TYPE_CHECKING:
    from lm_eval.api.task import Task

ROLLING = "bits_per_byte"
_MAX_SHOWN = 2000  # characters of a text in the rows for people
_MAX_BASELINE = 0.999


def metric_of(name: str, task: Task, wanted: str | None) -> str:
    """The metric that counts.

    Args:
        wanted: a metric's name; None: the first that is a share of right answers.

    Raises:
        UserError: there is no such metric, or none that is a share.
    """
    from lm_eval.api.metrics import mean

    metrics, better = task.aggregation(), task.higher_is_better()
    if task.OUTPUT_TYPE == "loglikelihood_rolling" and ROLLING in metrics and wanted in (None, ROLLING):
        return ROLLING
    shares = [each for each in metrics if metrics[each] is mean and better.get(each)]
    if wanted is not None and wanted in metrics and wanted not in shares:
        raise UserError(f"harness.metric={wanted}: {name}: is no share of right answers.")
    if wanted is not None and wanted not in shares:
        raise UserError(f"harness.metric={wanted}: {name} has {', '.join(metrics)}.")
    if not shares:
        raise UserError(
            f"harness.tasks: {name}: none of its metrics ({', '.join(metrics)}) is a share of right answers."
        )
    return wanted or shares[0]


def result_of(name: str, task: Task, found: Mapping[str, Any], metric: str, details: Mapping[str, Any]) -> TaskResult:
    """A result of the harness's own.

    Of whole texts (bits per byte) the outcome of each is the geometric mean of its bytes' probabilities.

    Args:
        found: what ``lm_eval.evaluator.evaluate`` gave, with samples.

    Raises:
        UserError: the metric of a problem does not lie between 0 and 1.
    """
    rows = [row for row in found["samples"][name] if metric in row["metrics"]]
    if not rows:
        raise UserError(f"harness.tasks: {name}: gave no {metric}.")
    rows = [row for row in rows if row["filter"] == rows[0]["filter"]]
    rows.sort(key=lambda row: row["doc_id"])  # each process had every so manieth
    outcomes = [_outcome(metric, row[metric]) for row in rows]
    if not all(0 <= outcome <= 1 for outcome in outcomes):
        raise UserError(
            f"harness.tasks: {name}: {metric} lies between {min(outcomes)} and {max(outcomes)}, not 0 and 1."
        )
    metrics = {
        key: float(value)
        for key, value in found["results"][name].items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float)) and math.isfinite(value)
    }
    stated = {"metric": metric, "filter": rows[0]["filter"], "metrics": metrics, "version": str(task.VERSION)}
    if metric == ROLLING:
        stated["remark"] = "accuracy: geometric mean of the probability of a byte"
    return make_result(
        name,
        [f"{row['doc_id']}:{row['doc_hash'][:12]}" for row in rows],
        outcomes,
        baseline=_baseline(task, rows),
        details={**stated, **details},
        answers=[_for_people(task, row, metric, outcome) for row, outcome in zip(rows, outcomes, strict=True)],
    )


def _outcome(metric: str, value: Any) -> float:
    if metric == ROLLING:
        nats, num_bytes = value  # log-probability, bytes
        return min(1.0, math.exp(nats / max(1, num_bytes)))
    return float(value)


def _baseline(task: Task, rows: Sequence[Mapping[str, Any]]) -> float:
    """Accuracy of guessing: one over the number of choices, on the mean of the problems."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    shares = [1 / max(1, len(task.doc_to_choice(row["doc"]))) for row in rows]
    return min(math.fsum(shares) / len(shares), _MAX_BASELINE)


def _for_people(task: Task, row: Mapping[str, Any], metric: str, outcome: float) -> dict[str, Any]:
    """Question without the examples before it, answer, reference, whether it is right."""
    doc, target = row["doc"], row["target"]
    question, answer = task.doc_to_text(doc), row["resps"][0][0]
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(doc)
        lengths = [len(each.encode()) if metric == "acc_bytes" else len(each) for each in choices]
        by_length = metric in ("acc_norm", "acc_bytes")
        nats = [row["resps"][n][0][0] / (max(1, lengths[n]) if by_length else 1) for n in range(len(choices))]
        answer = choices[nats.index(max(nats))]
        if isinstance(question, int):  # the choices are the beginnings, and the target is what follows them
            question, target = target, choices[question]
        elif isinstance(target, int) and 0 <= target < len(choices):
            target = choices[target]
    shown = {"question": question, "answer": answer, "reference": target}
    judged = {"correct": bool(outcome)} if outcome in (0, 1) else {"outcome": outcome}
    return {**{key: str(value)[:_MAX_SHOWN] for key, value in shown.items()}, **judged}
