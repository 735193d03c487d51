"""`train_stage`: one stage of a run, from checked settings to a bundle. Called again after a stop, it goes on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import Logger

from nanochat_pl.bundle.bundle import hash_of_weights, save_bundle, save_stage_info
from nanochat_pl.bundle.stage_info import StageInfo, library_versions
from nanochat_pl.bundle.tensors import TensorStream
from nanochat_pl.common.console import console, rank_zero_print
from nanochat_pl.common.device import choose_compute_dtype, gpu_memory_bytes
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_object, write_json
from nanochat_pl.common.run_dir import StageFolder
from nanochat_pl.common.schema import to_plain
from nanochat_pl.common.user_code import user_code
from nanochat_pl.data.cache.content_cache import fingerprint_of
from nanochat_pl.distributed import collectives, coordination
from nanochat_pl.model.counts import default_chunk_tokens
from nanochat_pl.model.gpt import GPT
from nanochat_pl.planning import Plan, hyperparameters
from nanochat_pl.planning.gpus import detected_device
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.training.callbacks.benchmarks import Benchmark, BenchmarkCache, measure, open_benchmarks
from nanochat_pl.training.callbacks.evaluation import Samples
from nanochat_pl.training.callbacks.graceful_stop import GracefulStop
from nanochat_pl.training.callbacks.metrics import log_everywhere
from nanochat_pl.training.callbacks.tensorboard import show_outcome, show_samples, show_tasks
from nanochat_pl.training.checkpoint.history import read_changes
from nanochat_pl.training.checkpoint.resume import newest_resume_file
from nanochat_pl.training.config import TrainConfig
from nanochat_pl.training.datamodule import RowsDataModule
from nanochat_pl.training.device import Machine, own_device, prepare_machine, require_own_gpus, with_plan
from nanochat_pl.training.guarded import guard_callbacks, guard_loggers, guard_module
from nanochat_pl.training.module import LMModule, ModuleConfig
from nanochat_pl.training.rl.pass_at_k import in_words
from nanochat_pl.training.stage_data.base_plan import Target, base_plan, refuse_unasked
from nanochat_pl.training.stage_data.source import corpus_of_stage, with_chosen_data
from nanochat_pl.training.stage_data.text import announce_streamed
from nanochat_pl.training.stages.registry import Stage, StageContext, StageData, stage_code
from nanochat_pl.training.trainer import FitConfig, FitResult, fit


def train_stage(
    config: TrainConfig,
    folder: StageFolder,
    cache: Path,
    make_loggers: Callable[[], Mapping[str, Logger]] = dict,
    make_callbacks: Callable[[], Mapping[str, Callback]] = dict,
    on_prepared: Callable[[StageData], None] = lambda data: None,
    module_class: type[LMModule] = LMModule,
) -> None:
    """Train a stage, or go on with it where resume files are.

    Args:
        config: the checked settings, with what is inherited from the parent stage.
        folder: of the stage; made and locked by the caller, and not finished.
        cache: where corpora and tokens are kept.
        make_loggers, make_callbacks: further ones by their keys, made first of all. One that fails later is left out.
        on_prepared: called before the training with what it is made of, the plan among it.
        module_class: of the LightningModule.

    Raises:
        UserError: what a person can put right.
        StopRequested: a signal ended it; the same command goes on.
    """
    resume_from = newest_resume_file(folder.checkpoints)
    definition = config.stage.definition
    if definition.from_scratch:
        coordination.raise_on_all_ranks(lambda: _refuse_hours(config))
    resuming = resume_from is not None
    corpus = coordination.raise_on_all_ranks(lambda: corpus_of_stage(config, folder, cache, resuming))
    config = with_chosen_data(config, folder, cache, resuming, corpus)
    if not definition.has_model:

        def make_bundle() -> None:
            with stage_code(definition, "make_bundle"):
                definition.make_bundle(config, folder, cache, corpus)

        coordination.run_on_rank_zero(make_bundle)
        return
    machine = coordination.raise_on_all_ranks(lambda: prepare_machine(config))
    require_own_gpus(machine.device)
    kind = f"{machine.device.type} in {machine.in_words}, {'compiled' if machine.compile else 'eager'}"
    kind += f", attention by {machine.attention}" if machine.attention else ""
    keys = "trainer.accelerator, model.compute_dtype, trainer.fp8, trainer.compile and trainer.attention"
    same_machines = f"Set {keys} to what all machines have."
    coordination.assert_equal_across_ranks(
        kind, lambda mains: f"would train on {kind}, the main process on {mains}.", same_machines
    )
    # Before anything is prepared: what cannot be made is known at once.
    loggers = coordination.raise_on_all_ranks(lambda: make_loggers() if collectives.is_rank_zero() else {})
    callbacks = guard_callbacks(coordination.raise_on_all_ranks(make_callbacks))
    stage_context = StageContext(config, folder, cache, machine, corpus, resuming)
    prepared = coordination.rank_zero_first(lambda: _prepare(definition, stage_context))
    rows = str(prepared.plan["device_batch_size"])
    smaller = "Set device_batch_size to what fits into the memory of all machines."
    coordination.assert_equal_across_ranks(
        rows, lambda mains: f"has memory for {rows} rows at once, the main one for {mains}.", smaller
    )
    machine = with_plan(machine, config, prepared.plan)
    on_prepared(prepared)
    _say_shortened_warmup(config, prepared.plan)
    coordination.raise_on_all_ranks(lambda: _require_short_prompts(config, prepared))
    coordination.run_on_rank_zero(lambda: write_json(folder.path / "plan.json", prepared.plan.to_plain()))
    hub = config.paths.hub_folder
    sandbox = config.evaluation.sandbox
    context = TaskContext(cache, config.data.max_bad_fraction, hub, sandbox, where="evaluation.chat", run_corpus=corpus)
    benchmarks = coordination.rank_zero_first(
        lambda: open_benchmarks(config.stage, config.evaluation, prepared.tokenizer, context)
    )
    benchmarks = [*benchmarks, *prepared.benchmarks]
    started = coordination.raise_on_all_ranks(lambda: guard_loggers(loggers))
    for logger in started:
        logger.log_hyperparams(_hyperparameters_of_run(config, folder, prepared.plan))
    stage = _make_stage(config, machine, prepared, module_class)
    if machine.compile and not console(stderr=True).is_terminal:  # where a bar would show that the first step is long
        rank_zero_print("Compiling the model; the first step takes up to some minutes. trainer.compile=false skips it.")
    _train(config, folder, machine, prepared, stage, resume_from, started, callbacks, benchmarks)


def _prepare(definition: Stage, context: StageContext) -> StageData:
    with stage_code(definition, "prepare"):
        return definition.prepare(context)


def _hyperparameters_of_run(config: TrainConfig, folder: StageFolder, plan: Plan) -> dict[str, Any]:
    """What every logger is given of a run: its name, all settings, the plan's numbers, versions and git state."""
    about = folder.path / "about.json"
    began = read_object(about, "Delete it: it only tells of the run's beginning.") if about.exists() else {}
    code = {key: began[key] for key in ("git", "versions") if key in began}
    values = {name: derived.value for name, derived in plan.values.items()}
    return {**to_plain(config), "run": folder.run, "stage_name": folder.stage, "plan": values, **code}


def _say_shortened_warmup(config: TrainConfig, plan: Plan) -> None:
    steps = plan["num_steps"]
    asked, made = (each.warmup_length(steps) for each in (config.schedule, config.schedule.fitted(steps)))
    if made < asked:
        rank_zero_print(
            f"Warm-up: {made:,} steps in place of {asked:,}, so that the warmdown of these {steps:,} steps has room."
        )


def _refuse_hours(config: TrainConfig) -> None:
    """Refuse a plan of hours on a CPU before anything is chosen, compiled or read for it."""
    device = own_device(config.trainer.accelerator)
    target = Target(detected_device(device), choose_compute_dtype(config.model.compute_dtype, device))
    refuse_unasked(config, base_plan(config, target, config.tokenizer.vocab_size, None), target, None)


def _train(
    config: TrainConfig,
    folder: StageFolder,
    machine: Machine,
    prepared: StageData,
    stage: LMModule,
    resume_from: Path | None,
    loggers: Sequence[Logger],
    callbacks: Sequence[Callback],
    benchmarks: Sequence[Benchmark],
) -> None:
    plan = prepared.plan
    data = RowsDataModule(prepared.rows, plan["rows_per_step"], plan["num_steps"], config.trainer.num_workers)
    at_start = config.evaluation.at_start
    samples = Samples(folder.path / "samples.jsonl", config.evaluation.sample_prompts, config.evaluation.sample_tokens)
    fitting = FitConfig(
        name=config.stage.name,
        folder=folder.path,
        trainer=config.trainer,
        evaluation=config.evaluation,
        device=machine.device,
        flops_per_token=plan["flops_per_token"],
        peak_flops=machine.peak_flops,
        validation=prepared.validation,
        samples=samples,
        benchmarks=benchmarks,
        loggers=loggers,
        callbacks=callbacks,
        resume_from=resume_from,
        resume_with_changes=config.resume_with_changes,
        validate_at_start=config.stage.definition.validates_at_start if at_start is None else at_start,
    )
    fitted = fit(stage, data, fitting)
    fitted.stop.when = "when what is being measured is done and the model is written"
    with fitted.stop:
        _finish(config, folder, prepared, stage, fitted, samples, benchmarks)
        fitted.stop.check_signal()  # what a person wants stopped is not followed by the next stage


def _require_short_prompts(config: TrainConfig, prepared: StageData) -> None:
    """Find a prompt that the model cannot continue now, and not after an hour of training."""
    most = prepared.model.rotary_reach - config.evaluation.sample_tokens - 1
    for prompt in config.evaluation.sample_prompts:
        if len(prepared.tokenizer.encode(prompt)) > most:
            raise UserError(f"evaluation.sample_prompts: {prompt[:60]!r}… is longer than the {most:,} tokens that fit.")


def _make_stage(config: TrainConfig, machine: Machine, prepared: StageData, module_class: type[LMModule]) -> LMModule:
    plan, trainer = prepared.plan, config.trainer
    on_cpu = machine.device.type == "cpu"
    chunk_tokens = trainer.loss_chunk_tokens or default_chunk_tokens(
        prepared.model.vocab_size, on_cpu, gpu_memory_bytes(machine.device)
    )
    recipe = ModuleConfig(
        model=dataclasses.replace(prepared.model, compute_dtype=machine.compute_dtype),
        hyperparameters=hyperparameters(plan, config.optim, machine.compute_dtype),
        schedule=config.schedule.fitted(plan["num_steps"]),
        num_steps=plan["num_steps"],
        device_batch_size=plan["device_batch_size"],
        seed=config.seed,
        compile=machine.compile,
        activation_checkpointing=trainer.activation_checkpointing,
        fp8=machine.fp8,
        loss_chunk_tokens=chunk_tokens,
        attention=trainer.attention,
        init=config.model.init,
        on_nonfinite=trainer.on_nonfinite,
        max_grad_norm=config.optim.max_grad_norm,
        batch_size_as_recorded=config.device_batch_size == "auto",
        identity={
            "steps": plan["num_steps"],
            "tokens a step": plan["total_batch_tokens"],
            "data": prepared.data["fingerprint"],
            "tokenizer": prepared.tokenizer.fingerprint,
        },
        choices={
            **machine.choices(),
            "processes": collectives.world_size(),
            "device_batch_size": plan["device_batch_size"],
            "activation_checkpointing": trainer.activation_checkpointing,
            "loss_chunk_tokens": chunk_tokens,
        },
    )
    if prepared.make_module is not None:
        return prepared.make_module(recipe, prepared.weights, prepared.moments)
    if module_class is LMModule:
        return LMModule(recipe, prepared.weights, prepared.moments)
    with user_code(f"stage.module={config.stage.module}: cannot be made"):
        stage = module_class(recipe, prepared.weights, prepared.moments)
    return guard_module(stage)


def _log(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    log_everywhere(trainer, metrics)
    for logger in trainer.loggers:
        logger.save()


def _measure_last(
    config: TrainConfig, folder: StageFolder, net: GPT, benchmarks: Sequence[Benchmark], stop: GracefulStop | None
) -> dict[str, float]:
    """Benchmarks of the model whose bundle is written. Where a start was stopped in them, the next one goes on.

    Raises:
        StopRequested: a stop was asked for.
    """
    key = coordination.run_on_rank_zero(
        lambda: fingerprint_of(hash_of_weights(folder.bundle), to_plain(config.evaluation), to_plain(config.rl))
    )
    measured = BenchmarkCache(folder.path / "benchmarks.json", key)
    metrics: dict[str, float] = {}
    for benchmark in benchmarks:
        metrics |= measure(benchmark, net, stop, measured)
    return metrics


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that a bundle can hold: JSON knows no others, and one of them is no reason to lose the weights."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            rank_zero_print(f"{name} is {value}, so it is left out: look at the weights before you use them.")
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _given_settings(folder: StageFolder) -> dict[str, str]:
    """What the stage's command line said, ``key=value`` each; nothing where its record is gone: a trained stage does
    not fail for that."""
    path = folder.path / "overrides.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return {key.lstrip("+~"): value for key, _, value in (line.partition("=") for line in lines)}


def _finish(
    config: TrainConfig,
    folder: StageFolder,
    prepared: StageData,
    stage: LMModule,
    fitted: FitResult,
    samples: Samples,
    benchmarks: Sequence[Benchmark],
) -> None:
    """Measure, sample, write the bundle; then benchmarks, which take long; last of all the mark that it is finished."""
    assert stage.net is not None
    step = fitted.trainer.global_step
    if step < stage.num_steps:
        rank_zero_print(
            f"{config.stage.name}: a callback ended the training after step {step:,} of {stage.num_steps:,}."
        )
    coordination.run_on_rank_zero(lambda: announce_streamed(prepared))
    rank_zero_print("Final validation and samples …")
    # One that a callback ended may have no file of its last step: after a stop it would train again.
    stop = fitted.stop if step >= stage.num_steps else None
    net = stage.whole_net()
    metrics = _finite(prepared.validation.measure(net, *([stop.check_signal] if stop else [])))

    def info() -> StageInfo:
        return StageInfo(
            stage=config.stage.name,
            step=step,
            plan=prepared.plan.to_plain(),
            settings=to_plain(config),
            metrics=metrics,
            parents=list(prepared.parents),
            versions=library_versions(),
            data=prepared.rows.record() | prepared.data,
            changes=read_changes(folder.path),
        )

    def show() -> None:
        _log(fitted.trainer, metrics)
        samples.rewind(step - 1)
        show_samples(fitted.trainer.loggers, samples.write(net, prepared.tokenizer, step), step)

    def write() -> None:
        moments = TensorStream(stage.optimizer.moment_shapes(), stage.optimizer.whole_moments())
        try:
            save_bundle(folder.bundle, info(), net=net, tokenizer=prepared.tokenizer, moments=moments)
        finally:
            for _ in moments.tensors:  # after an error, too, the others wait to send them
                pass

    def finish() -> None:
        if benchmarks:
            _log(fitted.trainer, later)
            save_stage_info(folder.bundle, info())
            show_tasks(fitted.trainer.loggers, "final", later, step)
        write_json(
            folder.path / "finished.json",
            {"step": step, "metrics": metrics, "seconds": fitted.seconds, "tokens": fitted.tokens},
        )
        show_outcome(fitted.trainer.loggers, _given_settings(folder), metrics)

    coordination.run_on_rank_zero(show)
    if not collectives.is_rank_zero():
        for _ in stage.optimizer.whole_moments():  # they are sent to the main process, as it writes them
            pass
    coordination.run_on_rank_zero(write)
    later = _finite(_measure_last(config, folder, net, benchmarks, stop)) if benchmarks else {}
    metrics |= later
    coordination.run_on_rank_zero(finish)
    stderr = f" ± {metrics['val/bpb_stderr']:.4f}" if "val/bpb_stderr" in metrics else ""
    bpb = f"validation {metrics['val/bpb']:.4f}{stderr} bits per byte, " if "val/bpb" in metrics else ""
    passed = in_words(metrics, config.rl.eval_ks())
    tokens = f"{fitted.tokens:,} tokens in {fitted.seconds:,.0f} s"
    rank_zero_print(f"{folder.run}/{folder.stage}: {bpb}{passed + ', ' if passed else ''}{tokens} → {folder.bundle}")
