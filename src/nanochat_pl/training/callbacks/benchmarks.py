"""Benchmarks of a model while it trains: CORE of a base model, tasks of one that chats. All processes take part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_object, write_json
from nanochat_pl.common.out_of_memory import release_memory
from nanochat_pl.data.hub.core_bundle import bundle_in_cache
from nanochat_pl.distributed import coordination
from nanochat_pl.engine import Engine
from nanochat_pl.evaluation.answer_letters import letter_ids
from nanochat_pl.evaluation.chat_tasks import evaluate_task
from nanochat_pl.evaluation.core.evaluate import evaluate_core_task, open_core
from nanochat_pl.evaluation.results import TaskResult, from_plain, summarize, to_plain
from nanochat_pl.model.gpt import GPT
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.mixture import build_tasks
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.training.callbacks.evaluation import ModelAndTokenizer
from nanochat_pl.training.callbacks.graceful_stop import GracefulStop, StopRequested
from nanochat_pl.training.callbacks.metrics import StepClock, log_everywhere
from nanochat_pl.training.callbacks.tensorboard import show_tasks
from nanochat_pl.training.config import EvaluationSettings, StageSettings


@dataclass(frozen=True)
class Benchmark:
    """Tasks that are measured again and again.

    Attributes:
        name: stands before the metrics' names: ``core/arc_easy``.
        every_steps: steps between two measurements; 0: only at the end of the stage.
        tasks: their names.
        measure_task: measures one of them, on all processes; calls its last argument now and then, as often as suits
            each. Where that may fail on one of them, it is within
            :func:`coordination.raise_on_all_ranks`.
        metrics, columns: what is logged of the results in place of accuracies and their mean, and all names of that.
        at_start: whether it is measured before the first step, too.
    """

    name: str
    every_steps: int
    tasks: Sequence[str]
    measure_task: Callable[[str, GPT, Callable[[], None]], TaskResult]
    metrics: Callable[[Sequence[TaskResult]], dict[str, float]] | None = None
    columns: Sequence[str] = ()
    at_start: bool = False


def open_benchmarks(
    stage: StageSettings, settings: EvaluationSettings, tokenizer: Tokenizer, context: TaskContext
) -> list[Benchmark]:
    """What is measured while a stage trains: CORE while it is taught text, tasks while it is taught to answer.

    Raises:
        UserError: a task cannot be measured, or is not here.
    """
    if not stage.trains_on_conversations:
        return _open_core(settings, tokenizer, context.cache_dir, context.hub)
    if settings.chat_every_steps is None or not settings.chat.chosen():
        return []
    tasks = build_tasks(settings.chat, "test", context)
    if not_judged := [name for name, task in tasks.items() if not task.judged]:
        raise UserError(f"evaluation.chat: {', '.join(not_judged)}: nobody can tell what a right answer is there.")
    for name, task in tasks.items():
        if task.kind == "categorical":
            letter_ids(tokenizer, task.letters(task[0]), name)

    def measure_task(name: str, net: GPT, meanwhile: Callable[[], None]) -> TaskResult:
        task = tasks[name]
        limit = settings.chat_limit if task.kind == "categorical" else settings.chat_limit_generative
        engine = Engine(ModelAndTokenizer(net, tokenizer))
        return evaluate_task(engine, task, limit, settings.chat_max_tokens, progress=lambda done, total: meanwhile())

    return [Benchmark("chat", settings.chat_every_steps, list(tasks), measure_task)]


def _open_core(
    settings: EvaluationSettings, tokenizer: Tokenizer, cache_dir: Path, hub: Path | None
) -> list[Benchmark]:
    if settings.core_every_steps is None:
        return []
    if settings.core.path is None and not bundle_in_cache(cache_dir).is_dir():
        rank_zero_print("CORE is left out: its data is not here (nanochat-pl download eval_bundle=true).")
        return []
    bundle = open_core(settings.core, cache_dir, hub)
    if bundle.missing:
        rank_zero_print(f"CORE: the evaluation bundle lacks {', '.join(bundle.missing)}.")
    every = f"every {settings.core_every_steps:,} steps and " if settings.core_every_steps else ""
    rank_zero_print(
        f"CORE ({len(bundle.tasks)} tasks) is measured {every}at the end: minutes on a GPU, more on a CPU;"
        " evaluation.core_every_steps=null leaves it out."
    )

    def measure_task(name: str, net: GPT, meanwhile: Callable[[], None]) -> TaskResult:
        return evaluate_core_task(bundle, name, net, tokenizer, progress=lambda done: meanwhile())

    return [Benchmark("core", settings.core_every_steps, bundle.tasks, measure_task)]


def columns_of(benchmarks: Sequence[Benchmark]) -> list[str]:
    """The names of all metrics that these can give."""
    return [
        column
        for each in benchmarks
        for column in each.columns or [f"{each.name}/{metric}" for metric in (*each.tasks, "mean", "mean_stderr")]
    ]


class BenchmarkCache:
    """Results at the end of a stage, a file of them: the next start of one that is stopped does not measure them again.

    All processes use it alike; the main one has the file.

    Args:
        path: of the file.
        key: names the weights and the settings; results under another one are none.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self._results: dict[str, dict[str, Any]] = coordination.run_on_rank_zero(self._read)

    def get(self, benchmark: str, task: str) -> TaskResult | None:
        """The result of a task, where it is there."""
        found = self._results.get(f"{benchmark}/{task}")
        return None if found is None else from_plain(found, str(self.path))

    def put(self, benchmark: str, result: TaskResult) -> None:
        """Keep the result of a task, without its answers."""
        self._results[f"{benchmark}/{result.name}"] = to_plain(dataclasses.replace(result, answers=[]))
        coordination.run_on_rank_zero(lambda: write_json(self.path, {"key": self.key, "results": self._results}))

    def _read(self) -> dict[str, dict[str, Any]]:
        kept = read_object(self.path, "Delete it: it is measured again.") if self.path.exists() else {}
        return kept["results"] if kept.get("key") == self.key else {}


def measure(
    benchmark: Benchmark, net: GPT, stop: GracefulStop | None = None, measured: BenchmarkCache | None = None
) -> dict[str, float]:
    """Accuracy of each task; mean and standard error of the centered accuracies, where every task could be measured.

    A task that cannot be measured is left out with a word, whatever it fails of: no reason to end a training.

    Args:
        net: the model; it is in training mode again afterwards.
        stop: asked before each task, and by one process that is alone also within.
        measured: what is there already, and takes what is found.

    Raises:
        StopRequested: a stop was asked for.
    """
    name, results = benchmark.name, list[TaskResult]()
    rank_zero_print(f"{name}: {len(benchmark.tasks)} tasks …")
    net.eval()
    for task in benchmark.tasks:
        if stop is not None:
            stop.check()
        result = None if measured is None else measured.get(name, task)
        if result is None:
            result = _measure_task(benchmark, task, net, stop.check_alone if stop is not None else lambda: None)
            if result is not None and measured is not None:
                measured.put(name, result)
        results += [] if result is None else [result]
    net.train()
    for result in results:
        if "remark" in result.details:
            rank_zero_print(f"{name}: {result.name}: {result.details['remark']}")
    if benchmark.metrics is not None:
        return benchmark.metrics(results)
    metrics = {f"{name}/{result.name}": result.accuracy for result in results}
    if len(results) == len(benchmark.tasks):
        mean = summarize(name, results)
        rank_zero_print(
            f"{name}: {mean.value:.4f} ± {mean.stderr:.4f}, the mean of {mean.num_tasks} centered accuracies."
        )
        metrics |= {f"{name}/mean": mean.value, f"{name}/mean_stderr": mean.stderr}
    return metrics


def _measure_task(benchmark: Benchmark, task: str, net: GPT, meanwhile: Callable[[], None]) -> TaskResult | None:
    """The result of a task, or none."""
    try:
        with coordination.failures_on_all_ranks(but=(StopRequested,)):
            return benchmark.measure_task(task, net, meanwhile)
    except UserError as error:  # all processes raise it
        why = error.problems[0]
    release_memory(net.device)  # the exception is gone, with the tensors that it would keep
    rank_zero_print(f"{benchmark.name}: {task} is left out of this measurement: {why}")
    return None


class PeriodicBenchmarks(Callback):
    """Measures benchmarks every N steps. The last step is left to the end of the stage, which always measures.

    Args:
        benchmarks: which.
        clock: stands still meanwhile.
        stop: ends the training where that was asked for.
        save: writes the resume file of the step, where it is not there: what follows may fail or take long.
    """

    def __init__(
        self,
        benchmarks: Sequence[Benchmark],
        clock: StepClock,
        stop: GracefulStop,
        save: Callable[[Trainer], None],
    ) -> None:
        self.benchmarks, self.clock, self.stop, self.save = benchmarks, clock, stop, save
        self._measured: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """The step that each was measured at last: a run that goes on from there does not measure it again."""
        return {"measured": self._measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a resume file."""
        self._measured = dict(state_dict["measured"])

    def due(self, step: int) -> list[Benchmark]:
        """Those that are still to be measured at a step before the last."""
        return [
            benchmark
            for benchmark in self.benchmarks
            if (benchmark.at_start if step == 0 else benchmark.every_steps and step % benchmark.every_steps == 0)
            and self._measured.get(benchmark.name) != step
        ]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Make up for what a stop kept from being measured after the step of the resume file; measure what is measured
        before the first step."""
        self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a step."""
        self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        for benchmark in self.due(step) if step < trainer.max_steps else ():
            with self.clock.paused():
                if step > 0:
                    self.save(trainer)
                metrics = measure(benchmark, pl_module.whole_net(), self.stop)
                trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
                log_everywhere(trainer, metrics)
                show_tasks(trainer.loggers, benchmark.name, metrics, step)
            self._measured[benchmark.name] = step
