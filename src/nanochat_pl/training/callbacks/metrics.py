"""Metrics of a run: measured by one callback, written to every logger."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torchmetrics import Metric

from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.data.batch import StepBatch
from nanochat_pl.data.packing.mixture import MixedRows
from nanochat_pl.data.packing.rows import Rows
from nanochat_pl.distributed import collectives
from nanochat_pl.evaluation.validation import name_by_source
from nanochat_pl.optim.schedules import schedule_values
from nanochat_pl.training.callbacks import peak_memory

SMOOTHING = 0.9


class StepClock:
    """Seconds of training between two steps, without those that evaluation and files take."""

    def __init__(self) -> None:
        self._mark, self._paused = time.perf_counter(), 0.0

    def lap(self) -> float:
        """Seconds since the last lap that were not paused."""
        now = time.perf_counter()
        seconds = now - self._mark - self._paused
        self._mark, self._paused = now, 0.0
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not the training's time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start


class StepMetrics(Callback):
    """Measures each step and writes its metrics every ``log_every_steps`` steps.

    Args:
        clock: what counts as the training's time.
        flops_per_token, peak_flops: of the model and of one device; without a peak there is no MFU.
        log_every_steps: see above.
        rows: what is trained on; of several sources each has metrics of its own. None: nothing is said of epochs.

    Attributes:
        latest: the metrics of the last step, for the progress bar.
    """

    def __init__(
        self,
        clock: StepClock,
        flops_per_token: float,
        peak_flops: float | None,
        log_every_steps: int,
        rows: Rows | MixedRows | None = None,
    ) -> None:
        self.rows, self.mixed = rows, rows if isinstance(rows, MixedRows) else None
        mixed = self.mixed
        self.clock, self.log_every_steps = clock, log_every_steps
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.latest: dict[str, float] = {}
        self._smoothed, self._weight, self._tokens, self._seconds = 0.0, 0.0, 0, 0.0
        self._recent: deque[float] = deque(maxlen=20)
        self._waited = 0.0
        # Nats and targets of each source since the last logged step, (2, S), on the device of the training; of the rows
        # of this process.
        self._by_source = torch.zeros(2, len(mixed.names) if mixed else 0)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same metrics."""
        return {
            "by_source": self._by_source_of_all().tolist(),
            "smoothed": self._smoothed,
            "weight": self._weight,
            "tokens": self._tokens,
            "seconds": self._seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a resume file."""
        self._smoothed, self._weight = state_dict["smoothed"], state_dict["weight"]
        self._tokens, self._seconds = state_dict["tokens"], state_dict["seconds"]
        if "by_source" in state_dict and collectives.is_rank_zero():  # older files have none
            self._by_source = torch.tensor(state_dict["by_source"])

    @property
    def seconds(self) -> float:
        """Training time of the run so far, all its parts together."""
        return self._seconds

    @property
    def tokens(self) -> int:
        """Tokens trained on so far (padding included)."""
        return self._tokens

    @property
    def seconds_per_step(self) -> float:
        """Median of the last steps: the first one, which compiles, does not count for long."""
        return statistics.median(self._recent)

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """What the module logs stays in ``callback_metrics``: the loggers are written to from here."""
        pl_module.logs_to_loggers = False

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """The first lap begins here."""
        self.clock.lap()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """What is waited for from here on is the step's; what was logged meanwhile is the last one's."""
        if trainer.global_step:
            self._log_late(trainer, pl_module)
        self._waited = collectives.seconds_waited()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        """After a step: ``global_step`` is the number of steps made. Tokens are those of all processes."""
        seconds, loss = self.clock.lap(), outputs["loss"].item()
        tokens = outputs.get("num_tokens") or (batch.num_rows_of_all or len(batch.inputs)) * batch.inputs.shape[1]
        if is_number := math.isfinite(loss):  # else the step was skipped
            self._smoothed = SMOOTHING * self._smoothed + (1 - SMOOTHING) * loss
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        self._tokens += tokens
        self._seconds += seconds
        self._recent.append(seconds)
        values = schedule_values(pl_module.schedule, trainer.global_step - 1, pl_module.num_steps)
        smoothed = {"train/loss_smoothed": self._smoothed / self._weight if self._weight else math.nan}
        self.latest = {
            "train/loss": loss,
            **(smoothed if pl_module.progress_metric in smoothed else {}),
            "train/lr_multiplier": values.lr_multiplier,
            "train/muon_momentum": values.muon_momentum,
            "train/muon_weight_decay": values.weight_decay_multiplier * pl_module.config.hyperparameters.weight_decay,
            "train/tokens": self._tokens,
            "train/tokens_per_second": tokens / seconds,
            "train/step_seconds": seconds,
            "train/seconds": self._seconds,
            "train/flops": self._tokens * self.flops_per_token,
            **self._epochs(batch.inputs.shape[1]),
            **pl_module.guard.metrics(),
            **peak_memory.peak_memory(pl_module.device),
        }
        if self.peak_flops is not None:
            peak_flops = self.peak_flops * collectives.world_size()
            self.latest["train/mfu"] = tokens / seconds * self.flops_per_token / peak_flops
        if collectives.world_size() > 1:
            self.latest["train/communication_seconds"] = collectives.seconds_waited() - self._waited
        if batch.sources is not None and is_number and outputs["row_losses"] is not None:
            self._add_by_source(batch.sources, outputs["row_losses"], batch.targets)
        if self._is_logged(trainer):
            by_source = {} if self.mixed is None else self._take_by_source(self.mixed)
            log_everywhere(trainer, _logged(trainer, pl_module) | self.latest | by_source)
        pl_module.logged.clear()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """What was logged behind the metrics of the last step."""
        self._log_late(trainer, pl_module)

    def _log_late(self, trainer: Trainer, pl_module: Any) -> None:
        if pl_module.logged and self._is_logged(trainer):
            log_everywhere(trainer, _logged(trainer, pl_module))
        pl_module.logged.clear()

    def _is_logged(self, trainer: Trainer) -> bool:
        """Whether the loggers get the metrics of the step that has just been made."""
        return trainer.global_step % self.log_every_steps == 0 or trainer.global_step == trainer.max_steps

    def _epochs(self, sequence_len: int) -> dict[str, float]:
        """Passes over the data so far, of a mixture over each source."""
        num_rows = self._tokens // sequence_len
        if isinstance(self.rows, MixedRows):
            epochs = zip(self.rows.names, self.rows.epochs_after(num_rows), strict=True)
            return {name_by_source("train/epochs", name): value for name, value in epochs}
        return {} if self.rows is None else {"train/epochs": self.rows.epochs_after(num_rows)}

    def _add_by_source(self, sources: Tensor, nats: Tensor, targets: Tensor) -> None:
        """Add a step's rows; nothing waits for the device."""
        of_rows = torch.stack([nats.float(), (targets != IGNORE_INDEX).sum(dim=1).float()])
        is_of = sources == torch.arange(self._by_source.shape[1], device=sources.device)[:, None]
        self._by_source = self._by_source.to(sources.device) + torch.where(is_of, of_rows[:, None], 0.0).sum(dim=2)

    def _by_source_of_all(self) -> Tensor:
        total = self._by_source.clone()
        collectives.all_reduce_(total)
        return total

    def _take_by_source(self, mixed: MixedRows) -> dict[str, float]:
        """Of each source the mean loss since the last logged step, if it had rows there, and its tokens so far."""
        all_nats, all_targets = self._by_source_of_all().tolist()
        self._by_source = torch.zeros_like(self._by_source)
        rows_so_far = mixed.turns.counts(self._tokens // mixed.sequence_len)
        metrics: dict[str, float] = {}
        for name, nats, num_targets, rows in zip(mixed.names, all_nats, all_targets, rows_so_far, strict=True):
            if num_targets:
                metrics[name_by_source("train/loss", name)] = nats / num_targets
            metrics[name_by_source("train/tokens", name)] = rows * mixed.sequence_len
        return metrics


def log_everywhere(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Write metrics at the current optimizer step to every logger; a metric that is not finite stands nowhere."""
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    for logger in trainer.loggers:
        logger.log_metrics(dict(finite), step=trainer.global_step)


def _logged(trainer: Trainer, pl_module: Any) -> dict[str, float]:
    """What the module logged since the last step, as numbers: what Lightning has to compute or reduce, as it did."""
    found: dict[str, float] = {}
    for name, (value, is_synced) in pl_module.logged.items():
        if is_synced or not isinstance(value, int | float):
            value = trainer.callback_metrics.get(name, value)
        found[name] = float(value.compute() if isinstance(value, Metric) else value)
    return found
