"""Stops or skips steps with a non-finite loss or gradient norm, and clips gradients.

Loss and gradient norm are those of all processes, the same bits on each, so all of them decide alike without asking.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import MAX_LISTED, SharedError
from nanochat_pl.data.batch import StepBatch
from nanochat_pl.distributed import collectives
from nanochat_pl.model.gpt import GPT
from nanochat_pl.optim.fully_sharded import is_sharded, own_rows
from nanochat_pl.training.config import OnNonfinite

START = 2.0**16
GOOD_STEPS = 2_000  # without an overflow: then the factor is doubled
MOST = 2.0**24  # the gradient of a loss is divided by its number of targets, so more has no use
# Steps in a row that are skipped: more never end, for the weights that give them stay as they are.
MAX_IN_A_ROW = 20


class LossScale:
    """Scales the loss in float16; in every other type it is 1 and stays so.

    Attributes:
        active: whether it does anything.
        factor: of the next step, a power of two.
    """

    def __init__(self, active: bool = False) -> None:
        self.active, self.factor, self._good_steps = active, START if active else 1.0, 0

    def of(self, loss: Tensor) -> Tensor:
        """The loss, scaled."""
        return loss * self.factor if self.active else loss

    def overflowed(self, loss: float, norm: float) -> bool:
        """Whether these metrics of a step tell of an overflow: of the gradients alone, for the loss is not scaled."""
        return self.active and math.isfinite(loss) and not math.isfinite(norm)

    def update(self, overflowed: bool) -> None:
        """After a step."""
        if not self.active:
            return
        self._good_steps = 0 if overflowed else self._good_steps + 1
        if overflowed:
            self.factor /= 2
        elif self._good_steps == GOOD_STEPS:
            self.factor, self._good_steps = min(2 * self.factor, MOST), 0

    def state_dict(self) -> dict[str, Any]:
        """For the resume file."""
        return {"active": self.active, "factor": self.factor, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a resume file; one of a run in another type has no factor to go on with."""
        if self.active and state.get("active"):
            self.factor, self._good_steps = state["factor"], state["good_steps"]


class StepModule(Protocol):
    """What the guard asks the LightningModule of a step for, to say what is wrong with it."""

    net: GPT | None

    @property
    def global_step(self) -> int: ...
    def row_losses(self, num_rows: int) -> Tensor | None: ...
    def resume_files(self) -> list[Path]: ...
    def inspect_command(self, step: int) -> str: ...


class Guard:
    """Looks at the metrics of each step, clips its gradients, and keeps count of what was skipped.

    Args:
        on_nonfinite: what to do with a step whose loss or gradient norm is not finite: ``stop`` or ``skip``.
        max_grad_norm: gradients with a larger L2 norm are scaled down to it; None: they stay as they are.
        loss_scale: of float16.

    Attributes:
        skipped_steps: steps of the run that changed nothing.
        clip_factor: by which clipping multiplied the gradients of the last step; 1 where it left them as they were.
    """

    def __init__(
        self,
        on_nonfinite: OnNonfinite = "stop",
        max_grad_norm: float | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.on_nonfinite, self.max_grad_norm = on_nonfinite, max_grad_norm
        self.loss_scale = loss_scale or LossScale()
        self.skipped_steps = self._in_a_row = 0
        self._norm, self._scale_of_step = math.nan, self.loss_scale.factor
        self.clip_factor = 1.0

    def passes(self, module: StepModule, batch: StepBatch, loss: float, norm: float) -> bool:
        """Whether a step may update the weights. Called on all processes, with the same metrics.

        Args:
            module: the weights are looked at where a metric is not finite.
            batch: this process's rows.
            loss: nats per target.
            norm: of the gradients, the loss scale taken out.

        Raises:
            SharedError: a metric is not finite and that is not to be skipped, or it was so too often in a row.
        """
        self._norm, self._scale_of_step = norm, self.loss_scale.factor
        overflowed = self.loss_scale.overflowed(loss, norm)
        self.loss_scale.update(overflowed)
        if math.isfinite(loss) and math.isfinite(norm):
            self._in_a_row = 0
            return True
        self.skipped_steps += 1
        self._in_a_row += 1
        scale = f"the loss scale is {self.loss_scale.factor:g} now"
        if overflowed and self._in_a_row < MAX_IN_A_ROW:
            rank_zero_print(f"step {module.global_step + 1}: float16 overflowed; {scale}, and the step is skipped.")
            return False
        problems = _what_is_not_finite(module, batch, loss, norm)
        if overflowed:
            problems.append(f"float16 overflowed in {self._in_a_row} steps in a row; {scale}.")
            raise _stopped(module, problems, "Use model.compute_dtype=bfloat16 or float32.")
        if self.on_nonfinite == "stop":
            raise _stopped(module, problems)
        if self._in_a_row >= MAX_IN_A_ROW:
            raise _stopped(module, [*problems, f"It is the {self._in_a_row}th step in a row that was skipped."])
        rank_zero_print(f"{' '.join(problems)} The step is skipped ({self.skipped_steps:,} so far).")
        return False

    def scale_gradients(self, optimizer: Any, norm: float) -> None:
        """Take the loss scale out of the reduced gradients, and clip them as ``torch.nn.utils.clip_grad_norm_`` does.

        For a step that passed: the loss scale is that of its loss, not the one that comes next.

        Args:
            optimizer: whose gradients are reduced.
            norm: theirs, the loss scale taken out.
        """
        self.clip_factor = 1.0 if self.max_grad_norm is None else min(1.0, self.max_grad_norm / (norm + 1e-6))
        if (factor := self.clip_factor / self._scale_of_step) != 1.0:
            optimizer.scale_gradients(factor)

    def metrics(self) -> dict[str, float]:
        """What is logged of the last step."""
        scale = {"train/loss_scale": self.loss_scale.factor} if self.loss_scale.active else {}
        return {"train/gradient_norm": self._norm, "train/skipped_steps": self.skipped_steps, **scale}

    def state_dict(self) -> dict[str, Any]:
        """For the resume file."""
        return {
            "skipped_steps": self.skipped_steps,
            "in_a_row": self._in_a_row,
            "loss_scale": self.loss_scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a resume file."""
        self.skipped_steps, self._in_a_row = state["skipped_steps"], state["in_a_row"]
        self.loss_scale.load_state_dict(state["loss_scale"])


def _stopped(module: StepModule, problems: list[str], fix: str = "") -> SharedError:
    """The end of a run, and what to do. All processes call it."""
    # One process looks, since another machine may not see the files.
    newest = collectives.broadcast_str(
        str(last_good_file(module.resume_files()) or "") if collectives.is_rank_zero() else ""
    )
    command = module.inspect_command(module.global_step + 1)
    text = f"Its text: {command}. " if command else ""
    return SharedError(
        [*problems, f"Nothing was updated. The newest resume file with finite weights: {newest or 'none'}."],
        fix or f"{text}trainer.on_nonfinite=skip leaves such steps out.",
    )


def _what_is_not_finite(module: StepModule, batch: StepBatch, loss: float, norm: float) -> list[str]:
    """A step's metric and rows; which rows of which process; weights that were so before. All processes call it."""
    metric = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradients is {norm}"
    assert module.net is not None
    losses = module.row_losses(len(batch.inputs))
    finite = [True] * len(batch.inputs) if losses is None else torch.isfinite(losses).tolist()
    numbers = [*(batch.row_numbers or range(batch.first_row, batch.first_row + len(finite)))]
    own = {
        "rows": numbers,
        "bad": [row for row, good in zip(numbers, finite, strict=True) if not good],
        "weights": [name for name, weight in module.net.named_parameters() if not _is_finite(weight)],
    }
    every = collectives.all_gather_plain(own)
    rows = [row for each in every for row in each["rows"]]
    first, last = min(rows), max(rows)
    among = "" if len(rows) == last + 1 - first else f"{len(rows):,} of "
    lines = [f"step {module.global_step + 1}: {metric}. Its rows are {among}{first:,} to {last:,}."]
    for rank, each in enumerate(every):
        whose = f" of process {rank}" if len(every) > 1 else ""
        if each["weights"]:
            lines.append(f"Weights{whose} that were not finite before the step: {_listed(each['weights'])}.")
        elif each["bad"]:
            lines.append(f"Rows{whose} whose loss is not finite: {_listed(each['bad'])}.")
    if len(lines) == 1:
        lines.append("The loss of each row is finite: it is the backward that is not.")
    return lines


def _listed(items: list[Any]) -> str:
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return ", ".join(str(item) for item in items[:MAX_LISTED]) + more


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite((own_rows(tensor) if is_sharded(tensor) else tensor).detach()).all())


def last_good_file(newest_first: Iterable[Path]) -> Path | None:
    """The newest resume file whose weights are all finite."""
    for path in newest_first:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        if all(_is_finite(weight) for weight in weights.values()):
            return path
    return None
