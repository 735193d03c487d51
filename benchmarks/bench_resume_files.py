"""What a resume file costs the training: steps while one is written to a slow disk, against steps while none is.

One fit writes a file every so many steps. The disk is made slow: writing takes as long as at 50 MiB a second, and
reading back as long again. About half of the steps are made meanwhile; both kinds alternate, so a machine that is now
quicker and now slower is so for both. A step's time has all that the training waits for at its end: of a step that
begins a file, the copy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from _report import parser_of, report, spread
from bench_trainer import RandomRows, interval, small_recipe, train
from lightning.pytorch import Callback

from nanochat_pl.planning.memory import resume_copy_bytes
from nanochat_pl.training.checkpoint import io as checkpoint_io
from nanochat_pl.training.checkpoint.resume import ResumeFiles

WARM_UP_FILES, ROWS_PER_STEP = 1, 2


def slowed(function: Callable[..., None], seconds: float) -> Callable[..., None]:
    """The same, and wait until so many seconds have passed."""

    def slow(*arguments: Any) -> None:
        begin = time.perf_counter()
        function(*arguments)
        time.sleep(max(0.0, seconds - (time.perf_counter() - begin)))

    return slow


class StepTimes(Callback):
    """Seconds of the steps between two files, in the order of these: (while one was written, while none was)."""

    def __init__(self) -> None:
        self.cycles: list[tuple[list[float], list[float]]] = []
        self._mark, self._was_writing = time.perf_counter(), False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After what has begun a file."""
        files = next(each for each in trainer.callbacks if isinstance(each, ResumeFiles))
        now, is_writing = time.perf_counter(), files.io.is_writing
        if is_writing and not self._was_writing:
            self.cycles.append(([], []))
        if self.cycles and (is_writing or not self._was_writing):  # not the step in which it was done
            self.cycles[-1][0 if is_writing else 1].append(now - self._mark)
        self._mark, self._was_writing = time.perf_counter(), is_writing


def main(num_files: int, every_steps: int, depth: int, rate: float, compiled: bool) -> None:
    """Report the ratio of both kinds of step, what a file costs, and what it would if the training waited."""
    num_steps = (num_files + WARM_UP_FILES) * every_steps + every_steps // 2
    recipe = small_recipe(num_steps, ROWS_PER_STEP, depth, compiled)
    num_bytes = resume_copy_bytes(recipe.model)
    seconds = num_bytes / rate
    checkpoint_io._write = slowed(checkpoint_io._write, seconds)  # type: ignore[assignment]
    checkpoint_io._verify = slowed(checkpoint_io._verify, seconds)  # type: ignore[assignment]
    copies: list[float] = []
    copy_to_host = checkpoint_io.copy_to_host

    def copy(*arguments: Any) -> Any:
        begin = time.perf_counter()
        copied = copy_to_host(*arguments)
        copies.append(time.perf_counter() - begin)
        return copied

    checkpoint_io.copy_to_host = copy
    times, rows = StepTimes(), RandomRows(recipe.model.vocab_size, recipe.model.sequence_len)
    train(recipe, rows, times, checkpoint_every_steps=every_steps)
    cycles = [(busy, quiet) for busy, quiet in times.cycles[WARM_UP_FILES:] if busy and quiet]
    ratios = [statistics.mean(busy) / statistics.mean(quiet) for busy, quiet in cycles]
    step = statistics.median(each for _, quiet in cycles for each in quiet)
    lost = [
        (sum(busy) - len(busy) * statistics.mean(quiet)) / (every_steps * statistics.mean(quiet))
        for busy, quiet in cycles
    ]
    found = {
        "steps while a file is written over those while none is": spread(ratios),
        "95% interval of their median": interval(ratios),
        "share of all time that is lost": spread(lost),
        "share that a training that waited would lose": 2 * seconds / (every_steps * step),
        "seconds": {"step": step, "copy": statistics.median(copies), "file": 2 * seconds},
        "MiB of a file": num_bytes / 2**20,
    }
    report("resume_files", len(ratios), found)


if __name__ == "__main__":
    parser = parser_of(__doc__, files=2, every_steps=16, depth=4, mib_per_second=50)
    parser.add_argument("--compile", action="store_true", help="compiled steps, which are shorter")
    options = parser.parse_args()
    main(options.files, options.every_steps, options.depth, options.mib_per_second * 2**20, options.compile)
