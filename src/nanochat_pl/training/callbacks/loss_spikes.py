"""Loss spikes: a step whose loss lies far above those before it is written down with its rows, in `spikes.jsonl`.

Far is so many standard deviations above the median of the last steps. Both are robust: the standard deviation is that
of a normal distribution with the same median distance from the median, so neither a spike within the window nor the
steep beginning of a training hides the next one, and a level that stays is the new median after half a window. Normally
distributed losses are six standard deviations above once in 10⁹ steps.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.common.files import explain_disk_errors, keep_lines_until
from nanochat_pl.data.batch import StepBatch
from nanochat_pl.distributed import collectives

WINDOW = 100  # steps: none is judged before so many
WORST_ROWS = 5
SD_OF_MEDIAN_DISTANCE = 1.4826  # of a normal distribution


class LossSpikes(Callback):
    """Looks at the loss of each step.

    Args:
        folder: of the stage.
        sigmas: standard deviations above the median from which on a loss is a spike; 0: none is.
    """

    def __init__(self, folder: Path, sigmas: float) -> None:
        self.path, self.sigmas = folder / "spikes.jsonl", sigmas
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def rewind(self, step: int) -> None:
        """Drop what a run that was stopped wrote after ``step``."""
        keep_lines_until(self.path, step)

    def state_dict(self) -> dict[str, Any]:
        """The losses that the next one is held against."""
        return {"losses": list(self._losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a resume file."""
        self._losses.extend(state_dict["losses"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        """After a step. The loss has the same bits on all processes, so they all see the same spikes."""
        loss = float(outputs["loss"])
        if not math.isfinite(loss) or outputs["skipped"]:
            return
        if self.sigmas and len(self._losses) == WINDOW:
            expected, deviation = middle_and_deviation(self._losses)
            if loss > expected + self.sigmas * deviation:
                line = {"step": trainer.global_step, "loss": loss, "expected": expected, "deviation": deviation}
                if outputs["row_losses"] is not None:
                    line |= rows_of_all(outputs["row_losses"], batch, expected)
                if collectives.is_rank_zero():
                    self._write(line, pl_module.inspect_command(trainer.global_step))
        self._losses.append(loss)

    def _write(self, line: dict[str, Any], command: str) -> None:
        with explain_disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        rank_zero_print(
            f"{self.path.parent.name}: the loss of step {line['step']:,} is {line['loss']:.3f},"
            f" after {line['expected']:.3f} ± {line['deviation']:.3f}. Its text: {command}"
        )


def middle_and_deviation(losses: Sequence[float] | deque[float]) -> tuple[float, float]:
    """Median and robust standard deviation; at least a thousandth of the median, for losses that stand still."""
    middle = statistics.median(losses)
    distance = statistics.median(abs(loss - middle) for loss in losses)
    return middle, max(SD_OF_MEDIAN_DISTANCE * distance, 1e-3 * abs(middle))


def rows_of_all(nats: torch.Tensor, batch: StepBatch, expected: float) -> dict[str, Any]:
    """The first and the last row of a step and the worst ones, over all processes, each of which gives its own."""
    own = {"rows": [batch.first_row, batch.first_row + len(nats)], "worst": worst_rows(nats, batch, expected)}
    every = collectives.all_gather_plain(own)
    worst = sorted((row for each in every for row in each["worst"]), key=lambda row: -row["excess_nats"])
    return {
        "first_row": min(each["rows"][0] for each in every),
        "last_row": max(each["rows"][1] for each in every) - 1,
        "worst_rows": worst[:WORST_ROWS],
    }


def worst_rows(nats: torch.Tensor, batch: StepBatch, expected: float) -> list[dict[str, float]]:
    """The rows that add most to a loss above the expected one: number, nats per target, nats above what was expected.

    Args:
        nats: of each row of ``batch``, summed over its targets, (R,).
        expected: nats per target.
    """
    num_targets = (batch.targets != IGNORE_INDEX).sum(dim=1)
    excess = nats.float() - expected * num_targets
    worst = [row for row in excess.argsort(descending=True)[:WORST_ROWS].tolist() if excess[row] > 0]
    return [
        {
            "row": batch.first_row + row,
            "loss": nats[row].item() / max(int(num_targets[row]), 1),
            "excess_nats": excess[row].item(),
        }
        for row in worst
    ]
