"""A tiny model, and two ways to train it in a moment: the step alone, and a whole fit of Lightning."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers.logger import Logger

from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.data.batch import StepBatch
from nanochat_pl.data.cache.tokens import build_token_cache
from nanochat_pl.data.packing.mixture import MixedRows
from nanochat_pl.data.packing.rows import Rows, packed_rows
from nanochat_pl.evaluation.validation import Validation
from nanochat_pl.model.config import GPTConfig, ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.muon_adamw import MuonAdamW
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.optim.schedules import ScheduleSettings, StepValues
from nanochat_pl.training.callbacks.benchmarks import Benchmark
from nanochat_pl.training.callbacks.evaluation import Samples
from nanochat_pl.training.checkpoint.resume import newest_resume_file
from nanochat_pl.training.config import EvaluationSettings, TrainerSettings
from nanochat_pl.training.datamodule import RowsDataModule
from nanochat_pl.training.module import LMModule, ModuleConfig
from nanochat_pl.training.nonfinite_guard import Guard
from nanochat_pl.training.trainer import FitConfig, fit
from tests.helpers.fake_data import ListSource
from tests.helpers.small_engine import byte_tokenizer

SEQUENCE_LEN = 16
ROWS_PER_STEP = 4


def tiny_model(vocab_size: int = 265, depth: int = 3) -> GPTConfig:
    """Depth 3: at depth 2 the middle of the stream is its end, and backout has no gradient but rounding."""
    settings = ModelSettings(depth=depth, aspect_ratio=16, head_dim=8, sequence_len=SEQUENCE_LEN)
    return resolve_model(settings, vocab_size, "float32")


class StepResult(NamedTuple):
    """What a step measured, as plain numbers."""

    loss: float
    gradient_norm: float
    num_targets: int
    skipped: bool


class BareModule(LMModule):
    """The module without a Trainer: network and optimizer are given, steps are made by hand."""

    global_step: int = 0  # type: ignore[assignment]
    optimizer: MuonAdamW = None  # type: ignore[assignment]

    def __init__(
        self, net: GPT, optimizer: MuonAdamW, schedule: ScheduleSettings, num_steps: int, device_batch_size: int
    ) -> None:
        LightningModule.__init__(self)
        self.net, self.optimizer, self.schedule, self.num_steps = net, optimizer, schedule, num_steps
        self.device_batch_size, self.max_rows, self.guard = device_batch_size, None, Guard()
        self.update = optimizer.step  # type: ignore[method-assign]
        self.micro_batch_hooks, self._row_losses = [], []
        self._loss, self._step_ended = (net.loss_by_row,), 0.0
        hyper: Any = SimpleNamespace(matrix_lr=0.0)
        self.config = ModuleConfig(net.config, num_steps, device_batch_size, hyper)
        self.logs_to_loggers, self.logged = True, {}

    def manual_backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        """There is no Trainer to log to."""

    log = log_dict  # type: ignore[assignment]

    def step(self, batch: StepBatch) -> StepResult:
        """One training step."""
        outputs = self.training_step(batch)
        numbers = outputs["loss"].item(), outputs["gradient_norm"].item()
        return StepResult(*numbers, outputs["num_targets"], outputs["skipped"])


class Loop(BareModule):
    """Small steps, and a record of what the schedule was set to."""

    def __init__(self, device_batch_size: int, num_steps: int = 6, compile_muon: bool = False) -> None:
        net = init_weights(GPT(tiny_model(vocab_size=40)).materialise(), seed=1)
        with torch.no_grad():  # both output projections begin at zero: a gradient would be hidden behind them
            for parameter in net.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        hyper = resolve_hyperparameters(OptimSettings(compile=compile_muon), width=net.config.width)
        optimizer = build_optimizer(net.named_parameters(), parameter_roles(net), hyper)
        optimizer.allocate_state()
        super().__init__(net, optimizer, ScheduleSettings(warmup_steps=2), num_steps, device_batch_size)
        self.values: list[StepValues] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self._set_step_values = optimizer.set_step_values
        optimizer.set_step_values = self._record  # type: ignore[method-assign]

    def _record(self, values: StepValues) -> None:
        """The schedule's values and the gradients, both final just before the optimizer steps."""
        self.values.append(values)
        self.gradients = {name: p.grad.clone() for name, p in self.net.named_parameters() if p.grad is not None}
        self._set_step_values(values)

    def train_steps(self, batch: StepBatch, num_steps: int = 1) -> list[float]:
        losses = []
        for _ in range(num_steps):
            losses.append(self.step(batch).loss)
            self.global_step += 1
        return losses


def batch_of(num_targets: list[int]) -> StepBatch:
    """A row for each number, with so many targets."""
    generator = torch.Generator().manual_seed(3)
    inputs, targets = torch.randint(40, (2, len(num_targets), SEQUENCE_LEN), generator=generator).unbind()
    for row, count in enumerate(num_targets):
        targets[row, count:] = IGNORE_INDEX
    return StepBatch(inputs, targets, sum(num_targets))


def tiny_rows(folder: Path, num_texts: int = 200) -> Rows:
    """Real rows of made-up words, tokenized and packed in ``folder``."""
    chance = random.Random(0)
    texts = ["".join(chance.choices("abcdefg ", k=chance.randint(5, 40))) for _ in range(num_texts)]
    tokenizer = byte_tokenizer()
    cache = build_token_cache(ListSource({"one": texts}), "train", tokenizer, folder)
    return packed_rows(cache, SEQUENCE_LEN, tokenizer.bos_id, "split", folder, num_rows=100)


def fit_tiny(
    folder: Path,
    num_steps: int = 4,
    compiled: bool = False,
    every_steps: int = 0,
    checkpoint_every_steps: int | None = 2,
    log_every_steps: int = 1,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[Callback] = (),
    mixed: MixedRows | None = None,
    num_texts: int = 200,
    num_workers: int = 0,
    recipe: Mapping[str, Any] | None = None,
    benchmarks: Sequence[Benchmark] = (),
    trainer: Mapping[str, Any] | None = None,
    module: type[LMModule] = LMModule,
) -> LMModule:
    """A real fit of ``num_steps`` steps of two micro-batches each, or the rest of one that was stopped, with one block.

    ``every_steps`` is for validation and samples, ``mixed`` for the training, in place of rows of one source. What is
    in ``recipe`` or ``trainer`` is otherwise than here.
    """
    recipe = dict(recipe or {})
    config = replace(tiny_model(depth=1), compute_dtype=recipe.pop("compute_dtype", "float32"))
    hyper = resolve_hyperparameters(OptimSettings(compile=compiled), width=config.width)
    schedule = ScheduleSettings(warmup_steps=2)
    usual = ModuleConfig(config, num_steps, ROWS_PER_STEP // 2, hyper, schedule, seed=0, compile=compiled)
    stage = module(replace(usual, **recipe))
    rows = tiny_rows(folder / "cache", num_texts)
    fitting = FitConfig(
        name="tiny",
        folder=folder,
        trainer=replace(
            TrainerSettings(
                log_every_steps=log_every_steps, checkpoint_every_steps=checkpoint_every_steps, keep_last=100
            ),
            **(trainer or {}),
        ),
        evaluation=EvaluationSettings(every_steps=every_steps, samples_every_steps=every_steps),
        device=torch.device("cpu"),
        flops_per_token=1e6,
        peak_flops=1e9,
        validation=Validation.of_rows(rows, 3, byte_tokenizer(), batch_size=2),
        samples=Samples(folder / "samples.jsonl", ["a", "bcd"], 2),
        benchmarks=benchmarks,
        loggers=loggers,
        callbacks=callbacks,
        resume_from=newest_resume_file(folder / "checkpoints"),
    )
    fit(stage, RowsDataModule(mixed or rows, ROWS_PER_STEP, num_steps, num_workers), fitting)
    return stage
