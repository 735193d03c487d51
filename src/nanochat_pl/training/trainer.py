"""One call of Lightning's Trainer: what is supported, with our callbacks in the order that they depend on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.out_of_memory import FIX, explain_out_of_memory
from nanochat_pl.common.user_code import UserCodeError
from nanochat_pl.data.packing.mixture import MixedRows
from nanochat_pl.data.packing.rows import Rows
from nanochat_pl.distributed import collectives, coordination
from nanochat_pl.evaluation.validation import Validation
from nanochat_pl.training.callbacks.benchmarks import Benchmark, PeriodicBenchmarks, columns_of
from nanochat_pl.training.callbacks.evaluation import PeriodicEvaluation, Samples
from nanochat_pl.training.callbacks.gc import GarbageCollection
from nanochat_pl.training.callbacks.graceful_stop import GracefulStop, StopRequested
from nanochat_pl.training.callbacks.loss_spikes import LossSpikes
from nanochat_pl.training.callbacks.metrics import StepClock, StepMetrics
from nanochat_pl.training.callbacks.metrics_csv import MetricsCSV
from nanochat_pl.training.callbacks.progress import TrainingProgress
from nanochat_pl.training.callbacks.tensorboard import RewindEvents
from nanochat_pl.training.callbacks.weight_sync import WeightSyncCheck
from nanochat_pl.training.checkpoint.resume import ResumeFiles
from nanochat_pl.training.checkpoint.resume_checks import step_to_go_on_from
from nanochat_pl.training.config import EvaluationSettings, TrainerSettings
from nanochat_pl.training.datamodule import RowsDataModule
from nanochat_pl.training.module import LMModule
from nanochat_pl.training.strategy import Launched, strategy_for


@dataclass(frozen=True)
class FitConfig:
    """All that one fit needs besides the stage and its data.

    ``resume_from`` is the file to go on from; ``validate_at_start``: whether the first weights are measured too.
    """

    name: str
    folder: Path
    trainer: TrainerSettings
    evaluation: EvaluationSettings
    device: torch.device
    flops_per_token: float
    peak_flops: float | None
    validation: Validation | None
    samples: Samples
    benchmarks: Sequence[Benchmark] = ()
    loggers: Sequence[Logger] = ()
    callbacks: Sequence[Callback] = ()
    resume_from: Path | None = None
    resume_with_changes: bool = False
    validate_at_start: bool = False


@dataclass(frozen=True)
class FitResult:
    """What a fit ended with: the trainer (its loggers are open), its stop, the seconds and tokens of training."""

    trainer: Trainer
    stop: GracefulStop
    seconds: float
    tokens: int


def fit(stage: LMModule, data: RowsDataModule, fitting: FitConfig) -> FitResult:
    """Train to the last step, from the resume file where one is given.

    Raises:
        StopRequested: a signal ended it; the resume file of the last finished step is written.
    """
    checkpoints = fitting.folder / "checkpoints"
    resume_from = fitting.resume_from
    first_step = coordination.raise_on_all_ranks(
        lambda: step_to_go_on_from(resume_from, stage.config, fitting.resume_with_changes) if resume_from else 0
    )
    sources = data.rows.names if isinstance(data.rows, MixedRows) else ()
    of_callbacks = [name for each in fitting.callbacks for name in getattr(each, "columns", ())]
    columns = [*stage.columns, *columns_of(fitting.benchmarks), *of_callbacks]
    csv = MetricsCSV(fitting.folder / "metrics.csv", sources, columns)
    metrics_kept = coordination.run_on_rank_zero(lambda: csv.rewind(first_step, fitting.trainer.log_every_steps))
    coordination.run_on_rank_zero(lambda: fitting.samples.rewind(first_step))
    loss_tells = stage.progress_metric == LMModule.progress_metric  # a loss with weights of both signs does not
    spikes = LossSpikes(fitting.folder, fitting.trainer.spike_sigmas if loss_tells else 0)
    coordination.run_on_rank_zero(lambda: spikes.rewind(first_step))
    clock = StepClock()
    rows = data.rows if isinstance(data.rows, Rows | MixedRows) else None
    metrics = StepMetrics(clock, fitting.flops_per_token, fitting.peak_flops, fitting.trainer.log_every_steps, rows)
    resume_files = ResumeFiles(
        checkpoints,
        fitting.trainer.checkpoint_every_steps,
        fitting.trainer.keep_last,
        clock,
        fitting.trainer.keep_best,
        0 if fitting.validation is None else fitting.evaluation.every_steps,
        fitting.trainer.checkpoint_every_minutes,
    )
    stop = GracefulStop(resume_files, fitting.trainer.max_seconds)
    agree = WeightSyncCheck(fitting.trainer.check_processes_every_steps)
    evaluation = PeriodicEvaluation(
        fitting.validation,
        fitting.samples,
        fitting.evaluation.every_steps,
        fitting.evaluation.samples_every_steps,
        clock,
        stop.check,
        fitting.validate_at_start,
    )
    benchmarks = PeriodicBenchmarks(fitting.benchmarks, clock, stop, partial(resume_files.save, wait=True))
    garbage = GarbageCollection(clock)
    # The order matters: metrics first, then the file that holds them, then what may fail or take long.
    looking_on = [TrainingProgress(fitting.name, metrics), spikes]

    def is_measured_again(metric: str) -> bool:
        measurement, _, _ = metric.partition("/")
        if measurement == "train" or metric in stage.columns:
            return False
        if first_step >= stage.num_steps:
            return True  # all that is measured at the end is measured anew
        due = measurement == "val" and evaluation.is_due(first_step)
        return due or metric in columns_of(benchmarks.due(first_step))

    events = RewindEvents(fitting.loggers, first_step, metrics_kept, is_measured_again, csv.columns)
    ours = [events, stop, agree, metrics, *looking_on, resume_files, evaluation, benchmarks, garbage]
    fill_memory: Any = torch.utils.deterministic
    deterministic_before = torch.are_deterministic_algorithms_enabled(), fill_memory.fill_uninitialized_memory
    # Where algorithms are deterministic PyTorch fills each new tensor before it is written: a tenth of a step on a CPU.
    fill_memory.fill_uninitialized_memory = False
    # Callbacks of others may want a logger on each process.
    loggers: list[Logger] = [*fitting.loggers, csv] if collectives.is_rank_zero() else [DummyLogger()]
    trainer = _trainer(stage, fitting, loggers, [*ours, *fitting.callbacks], resume_files.io)
    if resume_from:
        rank_zero_print(f"{fitting.name}: going on after step {first_step:,} ({resume_from}).")
    with stop, garbage, explain_out_of_memory(fitting.name, FIX):
        try:
            trainer.fit(stage, datamodule=data, ckpt_path=None if resume_from is None else str(resume_from))
        except (MisconfigurationException, ModuleNotFoundError) as error:
            raise UserError(f"callbacks, logger: Lightning refuses them: {error}") from error
        except Exception as error:
            # A signal goes to the compilers too: what they, or a class of the user's, then fail with is the stop that
            # was asked for.
            if isinstance(error, UserCodeError) or not isinstance(error, (UserError, StopRequested)):
                stop.check_after_error()
            raise
        finally:
            resume_files.io.wait()  # also where an error kept Lightning from its teardown
            torch.use_deterministic_algorithms(deterministic_before[0])
            fill_memory.fill_uninitialized_memory = deterministic_before[1]
        # Where a callback ended the fit there may be no file of its last step: that is measured and written first.
        if trainer.global_step >= stage.num_steps:
            stop.check()
    return FitResult(trainer, stop, metrics.seconds, metrics.tokens)


def _trainer(
    stage: LMModule, fitting: FitConfig, loggers: list[Logger], callbacks: list[Callback], io: CheckpointIO
) -> Trainer:
    _require_state_keys(callbacks)
    trainer = Trainer(
        accelerator={"cuda": "gpu"}.get(fitting.device.type, fitting.device.type),
        devices=1,
        strategy=strategy_for(fitting.device, fitting.trainer.strategy),
        max_steps=stage.num_steps,
        max_epochs=-1,
        logger=loggers,
        callbacks=callbacks,
        plugins=[io] if collectives.world_size() > 1 else [io, Launched()],
        # Compiled for a CPU, the gradient of an embedding is otherwise added up by threads in the order they come.
        deterministic=fitting.trainer.deterministic or fitting.device.type == "cpu",
        log_every_n_steps=fitting.trainer.log_every_steps,
        limit_val_batches=0,
        check_val_every_n_epoch=None,  # so that callbacks take validation for something that comes in steps
        detect_anomaly=fitting.trainer.detect_anomaly,
        profiler=_profiler(fitting),
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=fitting.folder,
    )
    # Lightning's own way to agree on SIGTERM waits for the device at each step, and hangs if asked at the wrong moment.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def _require_state_keys(callbacks: Sequence[Callback]) -> None:
    """Resume files hold the state of each callback under its key.

    Raises:
        UserError: two have the same one.
    """
    keys = Counter(each.state_key for each in callbacks if is_overridden("state_dict", each, parent=Callback))
    if several := [key for key, count in keys.items() if count > 1]:
        raise UserError(
            f"callbacks: {keys[several[0]]} of the class {several[0]} have a state, and one name for it.",
            "Give the class a property state_key that tells them apart.",
        )


def _profiler(fitting: FitConfig) -> Profiler | None:
    kinds = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    name = fitting.trainer.profiler
    # Lightning adds the number on this machine.
    filename = f"profile-{collectives.rank()}" if collectives.world_size() > 1 else "profile"
    return None if name is None else kinds[name](dirpath=fitting.folder, filename=filename)
