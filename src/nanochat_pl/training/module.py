"""The stages as LightningModules around the shared GPT. They differ in where they start; the step is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.model.compiled import CompiledLoss
from nanochat_pl.model.config import GPTConfig, InitSettings
from nanochat_pl.model.gpt import GPT, parameter_roles
from nanochat_pl.model.init import init_weights
from nanochat_pl.optim import Hyperparameters, MuonAdamW, ScheduleSettings, build_optimizer
from nanochat_pl.training.checkpoint.resume import ResumeFiles
from nanochat_pl.training.loss_scale import LossScale
from nanochat_pl.training.nonfinite_guard import Guard, OnNonfinite
from nanochat_pl.training.step import StepBatch, training_step


@dataclass(frozen=True)
class ModuleConfig:
    """What a stage needs to train: every number resolved."""

    model: GPTConfig
    hyperparameters: Hyperparameters
    schedule: ScheduleSettings
    num_steps: int
    device_batch_size: int
    seed: int
    compile: bool
    activation_checkpointing: bool = False
    loss_chunk_tokens: int | None = None
    init: InitSettings = field(default_factory=InitSettings)
    on_nonfinite: OnNonfinite = "stop"
    max_grad_norm: float | None = None
    # Whether a resumed run begins with the device_batch_size that it had to come down to before.
    batch_size_as_recorded: bool = False
    # What rows and length of the run come from: a resumed run must have the same.
    identity: dict[str, Any] = field(default_factory=dict)
    # What the machine chose: it may change the bits, and a resumed run says where it differs.
    choices: dict[str, Any] = field(default_factory=dict)


class LMModule(LightningModule):
    """A stage that trains the GPT on rows: base pretraining, and what all later stages share."""

    def __init__(self, recipe: ModuleConfig) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.recipe = recipe
        self.schedule, self.num_steps = recipe.schedule, recipe.num_steps
        self.device_batch_size = recipe.device_batch_size
        self.max_rows: int | None = None  # at once, since memory ran out with more: the same on all processes
        self.guard = Guard(
            recipe.on_nonfinite, recipe.max_grad_norm, LossScale(recipe.model.compute_dtype == "float16")
        )
        # Called before each micro-batch with its number: the progress bar moves and a stop is noticed there.
        self.micro_batch_hooks: list[Callable[[int], None]] = []
        self.net: GPT | None = None
        self._nats_of_rows: list[Tensor] = []

    def configure_model(self) -> None:
        """Build the model on the training device, with its first weights."""
        if self.net is None:
            recipe = self.recipe
            self.net = GPT(
                recipe.model,
                activation_checkpointing=recipe.activation_checkpointing,
                loss_chunk_tokens=recipe.loss_chunk_tokens,
            ).materialise(self._training_device())
            self.init_weights(self.net)
            # In a tuple: modules or bound methods as attributes would double the state dict's keys.
            self._loss = (CompiledLoss(self.net) if self.recipe.compile else self.net.loss_by_row,)

    def _training_device(self) -> torch.device:
        """Where the trainer trains: it moves the module there only after the model is built, once for each process."""
        trainer = self._trainer
        return self.device if trainer is None else trainer.strategy.root_device

    def init_weights(self, net: GPT) -> None:
        """Give the model its first weights: fresh ones."""
        init_weights(net, self.recipe.seed, self.recipe.init)

    def configure_optimizers(self) -> MuonAdamW:
        """The one optimizer, with its state allocated: a step never fails for lack of memory half-way."""
        assert self.net is not None
        optimizer = build_optimizer(self.net.named_parameters(), parameter_roles(self.net), self.recipe.hyperparameters)
        optimizer.allocate_state()
        self.initial_moments(optimizer)
        return optimizer

    def initial_moments(self, optimizer: MuonAdamW) -> None:
        """Give the optimizer its first moments: none here."""

    @property
    def optimizer(self) -> MuonAdamW:
        """The optimizer itself: what its methods note would stay in the object that Lightning wraps around it."""
        return self.optimizers().optimizer  # type: ignore[union-attr, return-value]

    def update(self) -> None:
        """Let the optimizer step, through Lightning's wrapper, which counts ``global_step``."""
        self.optimizers().step()  # type: ignore[union-attr]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put what the run is and what the machine chose into the resume file, to be compared when it is used."""
        checkpoint["nanochat_pl"] = {
            "identity": self.recipe.identity,
            "choices": {**self.recipe.choices, "device_batch_size": self.device_batch_size},
            "max_rows": self.max_rows,
            "guard": self.guard.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with what the guards had counted, and where memory had run out with as many rows as fitted."""
        saved = checkpoint["nanochat_pl"]
        if "guard" in saved:  # older files have none
            self.guard.load_state_dict(saved["guard"])
        self.max_rows = saved.get("max_rows", saved.get("most_rows"))
        if self.recipe.batch_size_as_recorded and self.max_rows and self.max_rows < self.device_batch_size:
            rank_zero_print(
                f"device_batch_size={self.max_rows}: with more, memory ran out before"
                f" (device_batch_size={self.device_batch_size} tries again)."
            )
            self.device_batch_size = self.max_rows

    def resume_files(self) -> list[Path]:
        """The run's resume files, newest first."""
        writers = [each for each in self.trainer.callbacks if isinstance(each, ResumeFiles)]  # type: ignore[attr-defined]
        return writers[0].files() if writers else []

    def inspect_command(self, step: int) -> str:
        """The command that shows the text of a step; these count from 1, as in metrics.csv."""
        folder = Path(self.trainer.default_root_dir)
        return f"nanochat-pl doctor stage={folder.name} run={folder.parent.name} step={step}"

    def row_losses(self, num_rows: int) -> Tensor:
        """Summed nats of each of the step's first ``num_rows`` rows, float32 (num_rows,)."""
        return torch.cat(self._nats_of_rows)[:num_rows]

    def weighted_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Summed nats over the targets of a micro-batch, compiled where that was asked for."""
        nats, row_losses = self._loss[0](inputs, targets)
        self._nats_of_rows.append(row_losses)
        return nats

    def between_micro_batches(self, part: int) -> None:
        """Let the callbacks look in between two micro-batches."""
        if part == 0:
            self._nats_of_rows = []  # a step that was stopped, or is done again, has left some
        for hook in self.micro_batch_hooks:
            hook(part)

    def training_step(self, batch: StepBatch, batch_idx: int) -> Mapping[str, Any]:
        """One optimizer step; Lightning's batch is the step's rows.

        Returns:
            ``loss`` (nats per target) and ``gradient_norm`` over all processes, float32 scalars on the CPU;
            ``num_targets`` of all of them; ``row_losses`` of this process's rows (R,), on the device; ``skipped``:
            whether a figure was not finite and nothing was updated.
        """
        result = training_step(self, batch)
        return {
            "loss": torch.tensor(result.loss),
            "gradient_norm": torch.tensor(result.gradient_norm),
            "num_targets": result.num_targets,
            "row_losses": self.row_losses(len(batch.inputs)),
            "skipped": result.skipped,
        }


class BaseStage(LMModule):
    """Pretraining from fresh weights."""


class SFTStage(LMModule):
    """Fine-tuning (mid, sft): starts from the weights of another stage and, for a warm start, from its moments."""

    def __init__(
        self, recipe: ModuleConfig, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(recipe)
        # In a tuple, so that Lightning neither moves nor saves them.
        self._parent = (weights, moments)

    def init_weights(self, net: GPT) -> None:
        """The parent's weights."""
        net.load_state_dict(self._parent[0])

    def initial_moments(self, optimizer: MuonAdamW) -> None:
        """The parent's moments, where there are any: the learning rates are this stage's own."""
        if self._parent[1] is not None:
            optimizer.load_moments(self._parent[1])
