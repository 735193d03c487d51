"""Metrics of a run in a file, `metrics.csv`: one row a step, which survives crashes and resumes."""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import explain_disk_errors, say_damaged_lines, whole_lines, write_text
from nanochat_pl.evaluation.validation import name_by_source
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
    def save_dir(self) -> str:
        """The folder of the file: ``trainer.log_dir`` where there is no other logger."""
        return str(self.path.parent)

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
        kept = {name: value for name, value in metrics.items() if name in self.columns}
        if not kept or step is None:  # of a logger's other users, in their own order of steps
            return
        if self._row and self._row["step"] != step:
            self._rows_before.append(self._row)
            self._row = {}
            if time.monotonic() - self._flushed_at >= SECONDS_BETWEEN_FLUSHES:
                self.save()
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
