"""pass@k on held-out problems, before, while and after a model learns from rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from nanochat_pl.engine import Engine
from nanochat_pl.evaluation.chat_tasks import evaluate_task
from nanochat_pl.evaluation.results import TaskResult
from nanochat_pl.model.gpt import GPT
from nanochat_pl.tasks.base import Task
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.training.callbacks.benchmarks import Benchmark
from nanochat_pl.training.callbacks.evaluation import ModelAndTokenizer
from nanochat_pl.training.rl.settings import RLSettings

MEAN = "mean"  # of several tasks


def pass_at_k_benchmark(tasks: Mapping[str, Task], tokenizer: Tokenizer, settings: RLSettings) -> list[Benchmark]:
    """Measures pass@k as a benchmark of the stage; none where it is not to be measured, or nothing can be judged.

    Args:
        tasks: their held-out parts.
    """
    judged = {name: task for name, task in tasks.items() if task.judged and task.kind == "generative"}
    if settings.eval_every_steps is None or not judged:
        return []
    names = [*judged, MEAN] if len(judged) > 1 else [*judged]

    def measure_task(name: str, net: GPT, meanwhile: Callable[[], None]) -> TaskResult:
        return evaluate_task(
            Engine(ModelAndTokenizer(net, tokenizer)),
            judged[name],
            settings.eval_problems,
            settings.max_answer_tokens,
            progress=lambda done, total: meanwhile(),
            num_samples=settings.eval_samples,
            temperature=1.0 if settings.eval_samples > 1 else 0.0,
        )

    return [
        Benchmark(
            "pass_at_k",
            settings.eval_every_steps,
            list(judged),
            measure_task,
            metrics=lambda results: pass_at_k_metrics(results, settings.eval_ks(), len(judged)),
            columns=[column for name in names for k in settings.eval_ks() for column in columns_of_k(k, name)],
            at_start=True,
        )
    ]


def columns_of_k(k: int, task: str) -> tuple[str, str]:
    """The names of pass@k of a task and of its standard error."""
    return f"pass_at_{k}/{task}", f"pass_at_{k}_stderr/{task}"


def pass_at_k_metrics(results: Sequence[TaskResult], ks: Sequence[int], num_tasks: int) -> dict[str, float]:
    """pass@k with its standard error over problems, of each task; of several tasks, all measured, also their mean."""
    rows = {result.name: {row["k"]: row for row in result.details["pass_at_k"]} for result in results}
    metrics: dict[str, float] = {}
    for k in ks:
        for name, by_k in rows.items():
            metrics |= dict(zip(columns_of_k(k, name), (by_k[k]["value"], by_k[k]["stderr"]), strict=True))
        if len(rows) == num_tasks > 1:
            value = math.fsum(by_k[k]["value"] for by_k in rows.values()) / num_tasks
            stderr = math.sqrt(math.fsum(by_k[k]["stderr"] ** 2 for by_k in rows.values())) / num_tasks
            metrics |= dict(zip(columns_of_k(k, MEAN), (value, stderr), strict=True))
    return metrics


def in_words(metrics: Mapping[str, float], ks: Sequence[int]) -> str:
    """pass@k for people, of the tasks' mean or of the only task; empty where it was not measured."""
    names = [name.partition("/")[2] for name in metrics if name.startswith("pass_at_1/")]
    if not names:
        return ""
    name = MEAN if MEAN in names else names[0]
    pairs = [(k, *columns_of_k(k, name)) for k in ks]
    return ", ".join(f"pass@{k} {metrics[value]:.3f} ± {metrics[stderr]:.3f}" for k, value, stderr in pairs)
