"""`nanochat-pl` with a fault put in: the program that tests of failures start, several of them with torchrun.

NANOCHAT_PL_TEST_FAULT is `WHAT RANK STEP`: what happens to the process of that rank when it has made so many steps.
NANOCHAT_PL_TEST_SECONDS is how long each step takes at least, NANOCHAT_PL_TEST_VALIDATION_SECONDS each batch of a
validation, NANOCHAT_PL_TEST_ROWS the step whose rows never come,
NANOCHAT_PL_TEST_JUDGE the rank of the process that gets a SIGUSR1 when it judges a sum. NANOCHAT_PL_TEST_CODES is a
folder where each process leaves its exit code.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import UserError

RANK = int(os.environ.get("RANK", 0))
MODULE = "tests.helpers.faults"


def fails(stage: Any) -> None:
    """What is this process's alone, and a bug."""
    raise ZeroDivisionError("a fault of this process alone")


def is_refused(stage: Any) -> None:
    """What is this process's alone, and a person can put right."""
    raise UserError("a file of this process alone cannot be read.", "Mend it.")


def is_killed(stage: Any) -> None:
    """As by the system where memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(stage: Any) -> None:
    """As on a network file system that does not answer; it hears no signal."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    time.sleep(10_000)


@torch.no_grad()
def gets_nan(stage: Any) -> None:
    """A weight is not a number."""
    next(stage.net.parameters()).view(-1)[0] = float("nan")


@torch.no_grad()
def flips_a_bit(stage: Any) -> None:
    """The last bit of one weight of the first matrix."""
    weight = next(each for each in stage.net.parameters() if each.ndim == 2 and each.dtype == torch.float32)
    weight.view(torch.int32).view(-1)[0] ^= 1


FAULTS = {each.__name__: each for each in (fails, is_refused, is_killed, hangs, gets_nan, flips_a_bit)}


def put_in() -> None:
    """Let the step end with the fault, and make others wait."""
    from nanochat_pl.data.packing.rows import Rows
    from nanochat_pl.evaluation.validation import Validation
    from nanochat_pl.tasks.synthetic.arithmetic import Arithmetic
    from nanochat_pl.training.callbacks import metrics_csv
    from nanochat_pl.training.datamodule import StepRows
    from nanochat_pl.training.module import LMModule

    metrics_csv.SECONDS_BETWEEN_FLUSHES = 0  # tests see by metrics.csv how far the training has come
    what, rank, step = (os.environ.get("NANOCHAT_PL_TEST_FAULT") or "- -1 -1").split()
    seconds = float(os.environ.get("NANOCHAT_PL_TEST_SECONDS", 0))
    whole = LMModule.training_step

    def faulty(stage: LMModule, *arguments: Any) -> Any:
        time.sleep(seconds)
        outputs = whole(stage, *arguments)
        if (RANK, stage.global_step) == (int(rank), int(step)):
            FAULTS[what](stage)
        return outputs

    slowly = float(os.environ.get("NANOCHAT_PL_TEST_VALIDATION_SECONDS", 0))
    measure = Validation.measure

    def slow(validation: Validation, net: Any, between: Any = lambda: None) -> Any:
        return measure(validation, net, lambda: (time.sleep(slowly), between())[1])

    last = int(os.environ.get("NANOCHAT_PL_TEST_ROWS", sys.maxsize))
    if last < sys.maxsize:
        Rows.is_streamed = True  # type: ignore[method-assign, assignment]
    wait_for = StepRows.wait_for

    def waits(rows: StepRows, step: int, check: Any) -> None:
        while step >= last:
            check()
            time.sleep(0.02)
        wait_for(rows, step, check)

    evaluate = Arithmetic.evaluate

    def judges(task: Arithmetic, *given: Any) -> bool:
        if os.environ.get("NANOCHAT_PL_TEST_JUDGE") == str(RANK):
            signal.raise_signal(signal.SIGUSR1)
        return evaluate(task, *given)

    Arithmetic.evaluate = judges  # type: ignore[method-assign]
    LMModule.training_step = faulty  # type: ignore[method-assign]
    Validation.measure = slow  # type: ignore[method-assign]
    StepRows.wait_for = waits  # type: ignore[method-assign]


if __name__ == "__main__":
    put_in()
    code = main()
    if folder := os.environ.get("NANOCHAT_PL_TEST_CODES"):
        Path(folder, str(RANK)).write_text(str(code))
    sys.exit(code)
