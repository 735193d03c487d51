"""How large weights, gradients and updates are, by role: what one looks at when a training does not learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from nanochat_pl.common.errors import UserError
from nanochat_pl.distributed import collectives
from nanochat_pl.model.roles import ROLES, parameter_roles
from nanochat_pl.training.callbacks.metrics import log_everywhere

# Of a large parameter a histogram is made of so many values, evenly spread.
MAX_HISTOGRAM_VALUES = 100_000


class Diagnostics(Callback):
    """Norms by role at a cadence and at the last step, and histograms of the weights.

    Metrics: ``weight_norm/ROLE`` (L2), ``gradient_norm/ROLE`` (L2, before clipping; with several processes each has
    only a part of the gradients, so they are left out), ``update_ratio/ROLE`` (L2 of the change of the weights in the
    step over that of the weights).

    Args:
        every_steps: steps between two measurements of the norms; each costs a copy of the weights.
        histograms_every_steps: steps between two histograms of every parameter, in TensorBoard; 0: none.

    Attributes:
        columns: the metrics that it may log, for metrics.csv.

    Raises:
        UserError: a number of steps is out of bounds.
    """

    columns = tuple(f"{name}/{role}" for name in ("weight_norm", "gradient_norm", "update_ratio") for role in ROLES)

    def __init__(self, every_steps: int = 50, histograms_every_steps: int = 0) -> None:
        if every_steps < 1:
            raise UserError(f"every_steps={every_steps}: must be at least 1.")
        if histograms_every_steps < 0:
            raise UserError(f"histograms_every_steps={histograms_every_steps}: must not be negative.")
        self.every_steps, self.histograms_every_steps = every_steps, histograms_every_steps
        self._before: dict[str, Tensor] = {}
        self._gradients: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse what it cannot measure.

        Raises:
            UserError: the weights are sharded.
        """
        if pl_module.is_sharded:
            raise UserError(
                "callbacks=[diagnostics]: measures whole weights; with trainer.strategy=fsdp no process has them.",
                fix="Leave it out, or use trainer.strategy=auto.",
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Keep the weights of a step that is measured, and measure its gradients."""
        if not self._is_due(trainer, trainer.global_step + 1, self.every_steps):
            return
        named = dict(pl_module.net.named_parameters())
        self._before = {name: each.detach().clone() for name, each in named.items()}
        if collectives.world_size() == 1:
            gradients = {name: each.grad for name, each in named.items() if each.grad is not None}
            clipped = norms_by_role(gradients, parameter_roles(pl_module.net))
            self._gradients = {role: norm / pl_module.guard.clip_factor for role, norm in clipped.items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what was measured."""
        if self._before:
            roles = parameter_roles(pl_module.net)
            weights = {name: each.detach() for name, each in pl_module.net.named_parameters()}
            sizes = norms_by_role(weights, roles)
            updates = norms_by_role({name: each - self._before[name] for name, each in weights.items()}, roles)
            ratios = {role: updates[role] / size for role, size in sizes.items() if size > 0}
            groups = {"weight_norm": sizes, "gradient_norm": self._gradients, "update_ratio": ratios}
            log_everywhere(
                trainer, {f"{name}/{role}": value for name, group in groups.items() for role, value in group.items()}
            )
            self._before, self._gradients = {}, {}
        if self.histograms_every_steps and self._is_due(trainer, trainer.global_step, self.histograms_every_steps):
            self._histograms(trainer, pl_module)

    def _is_due(self, trainer: Trainer, step: int, every: int) -> bool:
        return step % every == 0 or step == trainer.max_steps

    def _histograms(self, trainer: Trainer, pl_module: Any) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, each in pl_module.net.named_parameters():
                    flat = each.detach().flatten()
                    values = flat[:: max(1, flat.numel() // MAX_HISTOGRAM_VALUES)].float().cpu()
                    values = values[values.isfinite()]
                    if values.numel():
                        logger.experiment.add_histogram(f"weights/{name}", values, trainer.global_step)


def norms_by_role(tensors: Mapping[str, Tensor], roles: Mapping[str, str]) -> dict[str, float]:
    """L2 norm of the tensors of each role together, in float32; one wait for the device."""
    squares: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        square = tensor.float().square().sum()
        squares[roles[name]] = squares[roles[name]] + square if roles[name] in squares else square
    if not squares:
        return {}
    return dict(zip(squares, torch.stack([*squares.values()]).sqrt().tolist(), strict=True))
