"""The LightningModule around the GPT, with THE training step: the one place where gradients are computed.

R rows of this process in one optimizer step, T positions, M rows in memory at once (`device_batch_size`).
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import SharedError, UserError
from nanochat_pl.common.out_of_memory import FIX, is_out_of_memory, release_memory, runs_out_of_memory
from nanochat_pl.common.paths import run_keys
from nanochat_pl.common.schema import build, to_plain
from nanochat_pl.data.batch import StepBatch, ValidationBatch, micro_batches, num_micro_batches
from nanochat_pl.distributed import collectives
from nanochat_pl.evaluation.bits_per_byte import BitsPerByte
from nanochat_pl.evaluation.validation import validation_metrics
from nanochat_pl.model.compiled import CompiledLoss
from nanochat_pl.model.config import AttentionBackend, GPTConfig, InitSettings
from nanochat_pl.model.fp8 import Fp8Backend
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import Hyperparameters, OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.muon_adamw import MuonAdamW
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.optim.schedules import ScheduleSettings, StepValues, schedule_values
from nanochat_pl.training.checkpoint.resume import ResumeFiles
from nanochat_pl.training.config import OnNonfinite
from nanochat_pl.training.fully_sharded import ShardedWeights
from nanochat_pl.training.nonfinite_guard import Guard, LossScale


@dataclass(frozen=True)
class ModuleConfig:
    """What a module needs to train: every number resolved."""

    model: GPTConfig
    num_steps: int
    device_batch_size: int
    hyperparameters: Hyperparameters = None  # type: ignore[assignment]  # None: the recipe's for this width
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    seed: int = 42
    compile: bool = False
    activation_checkpointing: bool = False
    fp8: Fp8Backend | None = None
    loss_chunk_tokens: int | None = None
    attention: AttentionBackend = "auto"
    init: InitSettings = field(default_factory=InitSettings)
    on_nonfinite: OnNonfinite = "stop"
    max_grad_norm: float | None = None
    # Whether a resumed run begins with the device_batch_size that it had to come down to before.
    batch_size_as_recorded: bool = False
    # What rows and length of the run come from: a resumed run must have the same.
    identity: dict[str, Any] = field(default_factory=dict)
    # What the machine chose: it may change the bits, and a resumed run says where it differs.
    choices: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.hyperparameters is None:
            recipe = resolve_hyperparameters(
                OptimSettings(), width=self.model.width, compute_dtype=self.model.compute_dtype
            )
            object.__setattr__(self, "hyperparameters", recipe)


class LMModule(ShardedWeights, LightningModule):
    """The GPT, its optimizer and the training step of all stages.

    Args:
        config: every number; plain data (what a checkpoint holds) is checked and built.
        weights: what it starts from, by name; None: fresh weights.
        moments: of the optimizer, to start warm, by ``<parameter>.<moment>``.

    Metrics are logged under the names ``train/loss``, ``train/gradient_norm``, ``train/lr`` (of the matrices),
    ``train/tokens_per_second`` of this process, ``val/loss``, ``val/bpb`` and ``val/bpb_stderr``.

    Attributes:
        micro_batch_hooks: called before each micro-batch with its number: bars move and stops are noticed there.
        logs_to_loggers: whether ``self.log`` writes to the loggers. A callback that writes more, and in the order that
            exact resume needs, turns it off and takes what is in ``logged``.
        columns: further metrics that it logs, for `metrics.csv`.
        progress_metric: what the console shows of a step.
    """

    columns: ClassVar[Sequence[str]] = ()
    progress_metric: ClassVar[str] = "train/loss_smoothed"

    def __init__(
        self,
        config: ModuleConfig | Mapping[str, Any],
        weights: Mapping[str, Tensor] | None = None,
        moments: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        config = config if isinstance(config, ModuleConfig) else build(ModuleConfig, config, "config")
        self.config = config
        self.schedule, self.num_steps = config.schedule, config.num_steps
        self.device_batch_size = config.device_batch_size
        self.max_rows: int | None = None  # at once, since memory ran out with more: the same on all processes
        self.guard = Guard(
            config.on_nonfinite, config.max_grad_norm, LossScale(config.model.compute_dtype == "float16")
        )
        self.micro_batch_hooks: list[Callable[[int], None]] = []
        self.logs_to_loggers = True
        self.logged: dict[str, tuple[Any, bool]] = {}
        self.net: GPT | None = None
        self._initial = (weights, moments)  # in a tuple, so that Lightning neither moves nor saves them
        self._row_losses: list[Tensor] = []
        self._validation: list[BitsPerByte] = []
        self._step_ended = math.nan

    def configure_model(self) -> None:
        """Build the model on the training device, with its first weights."""
        if self.net is None:
            config = self.config
            self.net = GPT(
                config.model,
                activation_checkpointing=config.activation_checkpointing,
                loss_chunk_tokens=config.loss_chunk_tokens,
                attention=config.attention,
            ).materialise(self._training_device())
            self.init_weights(self.net)
            if config.fp8 is not None:
                self.net.enable_fp8(config.fp8)
            # In a tuple: modules or bound methods as attributes would double the state dict's keys.
            self._loss = (CompiledLoss(self.net) if self.config.compile else self.net.loss_by_row,)

    def _training_device(self) -> torch.device:
        """Where the trainer trains: it moves the module there only after the model is built, once for each process."""
        trainer = self._trainer
        return self.device if trainer is None else trainer.strategy.root_device

    def init_weights(self, net: GPT) -> None:
        """Give the model its first weights: those that were given, else fresh ones."""
        if (weights := self._initial[0]) is None:
            init_weights(net, self.config.seed, self.config.init)
        else:
            net.load_state_dict(weights)

    def configure_optimizers(self) -> MuonAdamW:
        """The one optimizer, with its state allocated: a step never fails for lack of memory half-way."""
        assert self.net is not None
        optimizer = build_optimizer(self.net.named_parameters(), parameter_roles(self.net), self.config.hyperparameters)
        optimizer.allocate_state()
        if (moments := self._initial[1]) is not None:
            optimizer.load_moments(moments)
        return optimizer

    @property
    def optimizer(self) -> MuonAdamW:
        """The optimizer itself: what its methods note would stay in the object that Lightning wraps around it."""
        return self.optimizers().optimizer  # type: ignore[union-attr, return-value]

    def update(self) -> None:
        """Let the optimizer step, through Lightning's wrapper, which counts ``global_step``."""
        self.optimizers().step()  # type: ignore[union-attr]

    def save_hyperparameters(self, *args: Any, ignore: str | Sequence[str] = (), **kwargs: Any) -> None:  # type: ignore[override]
        """As Lightning's; without what checkpoints hold anyway, and loggers cannot write."""
        kwargs.setdefault("frame", inspect.currentframe().f_back)  # type: ignore[union-attr]
        ignored = ["config", "weights", "moments", *([ignore] if isinstance(ignore, str) else ignore)]
        super().save_hyperparameters(*args, ignore=ignored, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what ``load_from_checkpoint`` needs, and what the run is and the machine chose, to compare on resume."""
        # Beside what a subclass saved with save_hyperparameters.
        checkpoint.setdefault(self.CHECKPOINT_HYPER_PARAMS_KEY, {})["config"] = to_plain(self.config)
        checkpoint["nanochat_pl"] = {
            "identity": self.config.identity,
            "choices": {**self.config.choices, "device_batch_size": self.device_batch_size},
            "max_rows": self.max_rows,
            "guard": self.guard.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with what the guards had counted, and where memory had run out with as many rows as fitted."""
        saved = checkpoint.get("nanochat_pl", {})
        if "guard" in saved:  # older files have none
            self.guard.load_state_dict(saved["guard"])
        self.max_rows = saved.get("max_rows", saved.get("most_rows"))
        if self.config.batch_size_as_recorded and self.max_rows and self.max_rows < self.device_batch_size:
            rank_zero_print(
                f"device_batch_size={self.max_rows}: with more, memory ran out before"
                f" (device_batch_size={self.device_batch_size} tries again)."
            )
            self.device_batch_size = self.max_rows

    def on_validation_epoch_start(self) -> None:
        """Begin new sums, a set for each source of a mixture."""
        count = len(loaders) if isinstance(loaders := self.trainer.num_val_batches, list) else 1
        self._validation = [BitsPerByte() for _ in range(count)]

    @torch.no_grad()
    def validation_step(self, batch: ValidationBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add rows: the model runs eagerly, as its training graph has another shape."""
        assert self.net is not None
        if len(batch.inputs):  # another process may have a row more
            losses = self.net.losses(batch.inputs.long(), targets := batch.targets.long())
            self._validation[dataloader_idx].update(losses, targets, batch.num_bytes)

    def on_validation_epoch_end(self) -> None:
        """Log bits per byte with its standard error, and nats per target, over all processes."""
        validation = getattr(getattr(self.trainer, "datamodule", None), "validation", None)
        names, shares = getattr(validation, "names", ()), getattr(validation, "shares", ())
        if (count := len(self._validation)) != len(names):  # loaders of another data module: each counts the same
            names = [str(number) if count > 1 else "" for number in range(count)]
            shares = [1 / count] * count
        metrics = validation_metrics(dict(zip(names, self._validation, strict=True)), shares)
        self._log(metrics, sync_dist=True)  # they are the same on all processes; without it Lightning warns

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """As Lightning's. In a command what is logged is written to the loggers with the other metrics of the step."""
        if not self.logs_to_loggers:
            self.logged[name], kwargs["logger"] = (value, bool(kwargs.get("sync_dist"))), False
        super().log(name, value, *args, **kwargs)

    def _log(self, metrics: Mapping[str, float], sync_dist: bool = False) -> None:
        self.log_dict(metrics, batch_size=1, sync_dist=sync_dist)
        if self.logs_to_loggers:
            # Lightning's name for the x-axis of what is logged here and by subclasses: steps that are done.
            self.log("step", float(self.global_step), batch_size=1, sync_dist=sync_dist)

    def resume_files(self) -> list[Path]:
        """The run's resume files, newest first."""
        writers = [each for each in self.trainer.callbacks if isinstance(each, ResumeFiles)]  # type: ignore[attr-defined]
        return writers[0].files() if writers else []

    def inspect_command(self, step: int) -> str:
        """The command that shows the text of a step, counted from 1 as in metrics.csv; empty where there is none."""
        folder = Path(self.trainer.default_root_dir)
        run = run_keys(folder.parent.name, folder.parent.parent)
        return f"nanochat-pl doctor stage={folder.name} {run} step={step}"

    def training_step(self, batch: StepBatch, batch_idx: int = 0) -> dict[str, Any]:
        """One optimizer step: gradients of all micro-batches and processes, then the schedule, then the update.

        The loss is the summed nats of all targets of the step, each times its weight where there are weights, divided
        by their number (or by what the step says), so neither the size of the micro-batches nor the number of processes
        changes it. Nothing is changed before the optimizer steps: a stop between micro-batches drops the step, and a
        step for which memory did not suffice is done again.

        Returns:
            ``loss`` (nats per target) and ``gradient_norm`` (L2, before clipping) over all processes, float32 scalars
            on the CPU; ``num_targets`` of all of them; ``row_losses`` of this process's rows (R,) or None;
            ``skipped``: whether a metric was not finite and nothing was updated.

        Raises:
            UserError: the step has no targets; its loss or gradient is not finite, and that is not to be skipped
                (raised before the update); a single row needs more memory than there is.
        """
        step, optimizer, guard = self.global_step, self.optimizer, self.guard
        num_targets = collectives.all_reduce_sum(batch.num_targets)
        if num_targets == 0:
            raise UserError(f"step {step + 1}: none of its rows has a token to train on.", "Look at the stage's data.")
        divisor = num_targets if batch.divisor is None else batch.divisor
        local_loss = self._accumulate_gradients(batch, divisor)
        with self._out_of_memory_hint():
            collectives.all_reduce_(local_loss)
            norm = optimizer.reduce_gradients() / guard.loss_scale.factor
        loss, norm = torch.stack([local_loss, norm]).tolist()  # the one wait for the device
        if passed := self.may_update(batch, loss, norm):
            guard.scale_gradients(optimizer, norm)
        else:
            optimizer.skip_step()
        values = schedule_values(self.schedule, step, self.num_steps)
        optimizer.set_step_values(values)
        with self._out_of_memory_hint("in the optimizer's step; its weights may be changed in part"):
            self.update()
        optimizer.zero_grad()
        self._log_step(batch, loss, norm, values)
        return {
            "loss": torch.tensor(loss),
            "gradient_norm": torch.tensor(norm),
            "num_targets": num_targets,
            "row_losses": self.row_losses(len(batch.inputs)),
            "skipped": not passed,
        }

    def may_update(self, batch: StepBatch, loss: float, norm: float) -> bool:
        """Whether a step with these metrics updates the weights. All processes call it; raises as the guard does."""
        return self.guard.passes(self, batch, loss, norm)

    def _accumulate_gradients(self, batch: StepBatch, divisor: float) -> Tensor:
        """Forward and backward of all micro-batches; gives this process's part of the step's loss, a scalar."""
        loss, ran_out = torch.zeros((), device=self.device), False
        last = num_micro_batches(batch.num_rows or len(batch.inputs), self.device_batch_size) - 1
        with self._local_gradients():
            for part, micro_batch in enumerate(micro_batches(batch, self.device_batch_size)):
                self.between_micro_batches(part)
                if self.is_sharded:  # the others wait for this process's weights: it cannot do the step again
                    with self._out_of_memory_hint("in forward or backward; nothing was changed"):
                        self._add_gradients(*micro_batch, divisor, loss)
                    continue
                with self._out_of_memory_hint(), self.optimizer.reducing(in_backward=part == last):
                    ran_out = ran_out or runs_out_of_memory(self._add_gradients, *micro_batch, divisor, loss)
        if collectives.all_reduce_max(ran_out):  # on any process
            self._halve_device_batch_size(ran_out)
            return self._accumulate_gradients(batch, divisor)
        return loss

    def _local_gradients(self) -> AbstractContextManager[None]:
        """Under Lightning's DDP, keep its wrapper from averaging gradients: the optimizer sums them, once a step."""
        strategy = self._trainer.strategy if self._trainer is not None else None
        return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else contextlib.nullcontext()

    def _add_gradients(
        self, inputs: Tensor, targets: Tensor, weights: Tensor | None, divisor: float, loss: Tensor
    ) -> None:
        """Forward and backward of a micro-batch, (M, T); its part of the step's loss is added to ``loss``."""
        # Those who override it for another loss need not know of weights.
        given = () if weights is None else (weights,)
        nats = self.weighted_loss(inputs, targets, *given) / divisor
        self.manual_backward(self.guard.loss_scale.of(nats))
        loss += nats.detach()

    def weighted_loss(self, inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Summed nats over the targets of a micro-batch. Override it for another loss, summed over the targets too.

        Args:
            inputs, targets: int64 (M, T); :data:`IGNORE_INDEX` where nothing is to be learnt.
            weights: float32 (M, T), factors on the nats; None: ones.
        """
        nats, row_losses = self._loss[0](inputs, targets, weights)
        self._row_losses.append(row_losses)
        return nats

    def row_losses(self, num_rows: int) -> Tensor | None:
        """Summed nats of each of the step's first ``num_rows`` rows, float32 (num_rows,); None where the loss of a
        subclass does not say."""
        return torch.cat(self._row_losses)[:num_rows] if self._row_losses else None

    def between_micro_batches(self, part: int) -> None:
        """Let the callbacks look in between two micro-batches."""
        if part == 0:
            self._row_losses = []  # a step that was stopped, or is done again, has left some
        for hook in self.micro_batch_hooks:
            hook(part)

    def _log_step(self, batch: StepBatch, loss: float, norm: float, values: StepValues) -> None:
        began, self._step_ended = self._step_ended, time.perf_counter()
        lr = self.config.hyperparameters.matrix_lr * values.lr_multiplier
        metrics = {"train/loss": loss, "train/gradient_norm": norm, "train/lr": lr}
        if not math.isnan(began):
            metrics["train/tokens_per_second"] = batch.inputs.numel() / (self._step_ended - began)
        self._log(metrics)

    def _halve_device_batch_size(self, ran_out: bool) -> None:
        """Drop the gradients, free memory, and take half the rows at once from now on. All processes call it.

        In forward and backward nothing but the gradients has been changed, so they are computed again.

        Args:
            ran_out: whether memory ran out on this process.

        Raises:
            SharedError: there was one row.
        """
        answers = collectives.all_gather_str("x" if ran_out else "")
        where = f" on process {', '.join(str(rank) for rank, x in enumerate(answers) if x)}" if len(answers) > 1 else ""
        self.optimizer.zero_grad()
        release_memory(self.device)
        rows, what = self.device_batch_size, f"step {self.global_step + 1}: out of memory{where}"
        if rows == 1:
            one = f"{what}, with one row of {self.config.model.sequence_len:,} tokens at once."
            # One process looks, since another machine may not see the files.
            raise SharedError(one, fix=FIX + collectives.broadcast_str(self._goes_on_from()))
        self.device_batch_size = self.max_rows = rows // 2
        rank_zero_print(
            f"{what} with device_batch_size={rows}: the step is done again, and all go on with {rows // 2}."
        )

    @contextlib.contextmanager
    def _out_of_memory_hint(self, where: str = "where the gradients are summed; nothing was changed") -> Iterator[None]:
        """Where memory runs out inside, the step cannot be done again: say from which file the run can go on."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            what = f"step {self.global_step + 1}: out of memory {where}."
            raise UserError(what, fix=FIX + self._goes_on_from()) from error

    def _goes_on_from(self) -> str:
        return next((f" The same command goes on from {path}." for path in self.resume_files()), "")
