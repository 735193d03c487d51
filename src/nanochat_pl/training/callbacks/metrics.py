"""Metrics of a run: measured by one callback, written to every logger, kept in `metrics.csv`."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import explain_disk_errors, say_damaged_lines, whole_lines, write_text
from nanochat_pl.data.batch import StepBatch
from nanochat_pl.data.packing.mixture import MixedRows
from nanochat_pl.data.packing.rows import Rows
from nanochat_pl.distributed import collectives
from nanochat_pl.evaluation.validation import name_by_source
from nanochat_pl.optim.schedules import schedule_values
from nanochat_pl.training.callbacks import peak_memory

COLUMNS = (
    "step",
    "train/loss",
    "train/loss_smoothed",
    "train/lr_multiplier",
    "train/muon_momentum",
    "train/muon_weight_decay",
    "train/tokens",
    "train/tokens_per_second",
    "train/mfu",
    "train/step_seconds",
    "train/seconds",
    "train/flops",
    "train/epochs",
    "train/communication_seconds",
    "train/gradient_norm",
    "train/skipped_steps",
    "train/loss_scale",
    *peak_memory.COLUMNS,
    "val/bpb",
    "val/bpb_stderr",
    "val/loss",
)
# Of each source of a mixture, with its name behind them.
COLUMNS_BY_SOURCE = ("train/loss", "train/tokens", "train/epochs", "val/bpb")
SMOOTHING = 0.9
SECONDS_BETWEEN_FLUSHES = 2.0


class MetricsCSV(Logger):
    """`metrics.csv`: one row a step, one column a metric, empty where nothing was measured.

    A resumed run cuts the rows after the step that it resumes from, so no step stands in the file twice. Rows
    are written every few seconds, at once where more than the training was measured, and by :meth:`save`: at resume
    files, stops and the end.

    Args:
        path: of the file.
        sources: names of a mixture's sources; each has columns of its own.
        further: further columns.
    """

    def __init__(self, path: Path, sources: Sequence[str] = (), further: Sequence[str] = ()) -> None:
        super().__init__()
        self.path = path
        self.columns = (
            *COLUMNS,
            *(name_by_source(column, source) for source in sources for column in COLUMNS_BY_SOURCE),
            *further,
        )
        self._row: dict[str, Any] = {}
        self._rows_before: list[dict[str, Any]] = []  # finished, and not written yet
        self._written_to: int | None = None  # where the first of these rows begins in the file; None: at its end
        self._flushed_at = -math.inf

    @property
    def name(self) -> str:
        """Lightning's name of this logger."""
        return "csv"

    @property
    def version(self) -> str:
        """One file for the whole run."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The settings stand in config.yaml already."""

    def rewind(self, step: int, log_every_steps: int = 1) -> dict[str, float]:
        """Drop what a run that was stopped wrote after ``step``, or begin the file.

        Metrics of what is measured no longer keep their columns, behind the others. The row of ``step`` itself stays
        open: its validation may be still to come. Damaged rows are dropped, and rows that are missing are lost: both
        with a word.

        Args:
            step: to go on from.
            log_every_steps: at least so often there should be a row.

        Returns:
            the metrics of ``step``, empty where none were written.

        Raises:
            UserError: it is no regular file, cannot be read, or its header is damaged.
        """
        kept = [row for row in self._read() if int(row["step"]) <= step]
        self._say_missing_rows([int(row["step"]) for row in kept], step, log_every_steps)
        metrics = dict.fromkeys(name for row in kept for name, value in row.items() if name and value)
        self.columns += tuple(name for name in metrics if name not in self.columns)
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore", restval="", lineterminator="\n")
        writer.writeheader()
        for row in kept:
            if int(row["step"]) == step:
                self._row = {**{name: value for name, value in row.items() if name in self.columns}, "step": step}
                self._written_to = len(text.getvalue().encode("utf-8"))
            writer.writerow(row)
        write_text(self.path, text.getvalue())
        return {name: float(value) for name, value in self._row.items() if name != "step" and value}

    def _read(self) -> list[dict[str, str]]:
        """The rows of the file; a last one that was cut off is none."""
        lines = whole_lines(self.path) if self.path.exists() else []
        if not lines:
            return []
        names = _cells(lines[0])
        if names is None or names[0] != "step" or len(set(names)) < len(names):
            raise UserError(
                f"{self.path}: line 1 is damaged: it does not name the columns.",
                "Bring the file back from a copy; or move it away, and the training goes on without its metrics.",
            )
        rows = [_row(names, line) for line in lines[1:]]
        say_damaged_lines(self.path, rows.count(None))
        return [row for row in rows if row is not None]

    def _say_missing_rows(self, steps: Sequence[int], step: int, log_every_steps: int) -> None:
        """What a resume file counts on is there: the rows before it were written first."""
        gaps = [later - earlier for earlier, later in itertools.pairwise([0, *steps])]
        last = max(steps, default=0)
        if last <= step - max(log_every_steps, *gaps, 1):
            rank_zero_print(f"{self.path}: the metrics of steps {last + 1:,} to {step:,} are lost.")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Take metrics of a step; they go into the step's one row, also where that is written already."""
        if self._row and self._row["step"] != step:
            self._rows_before.append(self._row)
            self._row = {}
            if time.monotonic() - self._flushed_at >= SECONDS_BETWEEN_FLUSHES:
                self.save()
        kept = {name: value for name, value in metrics.items() if name in self.columns}
        self._row.update({"step": step, **kept})
        if not all(name.startswith("train/") for name in kept):
            self.save()

    def save(self) -> None:
        """Write the rows at hand, over what was written of the first of them before."""
        rows = [*self._rows_before, *([self._row] if self._row else [])]
        if not rows:
            return
        lines = [self._line(row) for row in rows]
        with explain_disk_errors(self.path), self.path.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            self._written_to = end if self._written_to is None else self._written_to
            file.seek(self._written_to)
            file.write(b"".join(lines))
            file.truncate()  # not before: a kill in between would cost a row that a resume file counts on
        # The row of this step may still get metrics, and is then written again.
        self._written_to = self._written_to + sum(map(len, lines[: len(self._rows_before)])) if self._row else None
        self._rows_before, self._flushed_at = [], time.monotonic()

    def _line(self, row: Mapping[str, Any]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, restval="", lineterminator="\n").writerow(row)
        return text.getvalue().encode("utf-8")

    def finalize(self, status: str) -> None:
        """Write the last rows."""
        self.save()


def _cells(line: bytes) -> list[str] | None:
    """The cells of one line, None where it is damaged. By itself: an odd quotation mark would take the next lines."""
    try:
        return next(csv.reader([line.decode("utf-8")]), [""])
    except (UnicodeDecodeError, csv.Error):
        return None


def _row(names: Sequence[str], line: bytes) -> dict[str, str] | None:
    """A row of metrics by their columns, None where it is damaged."""
    cells = _cells(line)
    if cells is None or len(cells) != len(names) or not (cells[0].isascii() and cells[0].isdigit()):
        return None
    try:
        for cell in filter(None, cells):
            float(cell)
    except ValueError:
        return None
    return dict(zip(names, cells, strict=True))


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
        """What is waited for from here on is the step's."""
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
        if trainer.global_step % self.log_every_steps == 0 or trainer.global_step == trainer.max_steps:
            by_source = {} if self.mixed is None else self._take_by_source(self.mixed)
            own = {name: float(value) for name, value in pl_module.logged.items()}
            log_everywhere(trainer, own | self.latest | by_source)
        pl_module.logged.clear()

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
