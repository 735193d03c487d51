"""What Lightning costs: a step of the Trainer, with all callbacks and loggers, against a bare PyTorch loop's.

Both train twins of the demo's model on the same rows. The bare step runs inside the Trainer's run, right after each of
its steps, so the two alternate and the machine's moods meet both. The Trainer's time runs from the end of one bare step
to the end of the next Trainer step: fetching the batch, hooks, metrics and progress are in it.
"""

from __future__ import annotations

import copy
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import parser_of, report, spread
from lightning.pytorch import Callback

from nanochat_pl.cli._warnings import quieten
from nanochat_pl.common.device import choose_compute_dtype
from nanochat_pl.data.batch import micro_batches
from nanochat_pl.model.compiled import CompiledLoss
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.counts import flops_per_token
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.optim.schedules import ScheduleSettings, schedule_values
from nanochat_pl.training.callbacks.evaluation import Samples
from nanochat_pl.training.config import EvaluationSettings, TrainerSettings
from nanochat_pl.training.datamodule import RowsDataModule, StepRows
from nanochat_pl.training.module import LMModule, ModuleConfig
from nanochat_pl.training.trainer import FitConfig, fit

ROWS_PER_STEP = 16
WARM_UP_STEPS = 5


class RandomRows:
    """Rows of random ids, as quick to read as rows can be."""

    def __init__(self, vocab_size: int, sequence_len: int) -> None:
        self.ids = np.random.RandomState(0).randint(0, vocab_size, (512, sequence_len + 1))

    def __len__(self) -> int:
        return len(self.ids)

    def wait_for(self, num_rows: int, check: Any) -> None:
        """They are there."""

    def epochs_after(self, num_rows: int) -> float:
        """They are one epoch."""
        return num_rows / len(self)

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = self.ids[np.asarray(numbers)]
        return rows[:, :-1].copy(), rows[:, 1:].copy()


class BareLoop(Callback):
    """The same steps without Lightning, one after each of the Trainer's."""

    def __init__(self, recipe: ModuleConfig, data: StepRows) -> None:
        self.recipe, self.data = recipe, data
        self.net = init_weights(GPT(recipe.model).materialise(), recipe.seed)
        self.loss = CompiledLoss(self.net) if recipe.compile else self.net.loss_by_row
        self.optimizer = build_optimizer(self.net.named_parameters(), parameter_roles(self.net), recipe.hyperparameters)
        self.optimizer.allocate_state()
        self.pairs: list[tuple[float, float]] = []
        self._mark = time.perf_counter()

    def step(self, number: int) -> float:
        """One bare optimizer step; gives the loss."""
        batch = self.data[number]
        total = torch.zeros(())
        for inputs, targets, _ in micro_batches(batch, self.recipe.device_batch_size):
            nats = self.loss(inputs, targets)[0] / batch.num_targets
            nats.backward()
            total += nats.detach()
        self.optimizer.set_step_values(schedule_values(self.recipe.schedule, number, self.recipe.num_steps))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.item()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The Trainer has made a step: measure it, then make and measure the bare one."""
        trainer_seconds = time.perf_counter() - self._mark
        start = time.perf_counter()
        self.step(trainer.global_step - 1)
        self._mark = time.perf_counter()
        self.pairs.append((trainer_seconds, self._mark - start))


def small_recipe(num_steps: int, rows_per_step: int, depth: int, compiled: bool) -> ModuleConfig:
    """The demo's model at depth 4, and steps of one micro-batch."""
    dtype = choose_compute_dtype("auto", torch.device("cpu"))
    model = resolve_model(ModelSettings(depth=depth, head_dim=64, sequence_len=256), 4096, dtype)
    hyper = resolve_hyperparameters(OptimSettings(matrix_lr=0.012), width=model.width, compute_dtype=dtype)
    return ModuleConfig(model, num_steps, rows_per_step, hyper, ScheduleSettings(), seed=0, compile=compiled)


def train(recipe: ModuleConfig, rows: Any, callback: Callback, checkpoint_every_steps: int) -> None:
    """Pretrain as a stage does, without validation and samples, in a folder that is gone afterwards."""
    quieten()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fitting = FitConfig(
            name="bench",
            folder=folder,
            trainer=TrainerSettings(accelerator="cpu", checkpoint_every_steps=checkpoint_every_steps),
            evaluation=EvaluationSettings(every_steps=0, samples_every_steps=0),
            device=torch.device("cpu"),
            flops_per_token=flops_per_token(recipe.model),
            peak_flops=None,
            validation=None,
            samples=Samples(folder / "samples.jsonl", [], 1),
            callbacks=[callback],
        )
        fit(LMModule(recipe), RowsDataModule(rows, recipe.device_batch_size, recipe.num_steps), fitting)


def interval(ratios: list[float], rounds: int = 10_000) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(rounds))
    return medians[int(0.025 * rounds)], medians[int(0.975 * rounds)]


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__, pairs=10, depth=4)
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    recipe = small_recipe(options.pairs + WARM_UP_STEPS, ROWS_PER_STEP, options.depth, not options.eager)
    model = recipe.model
    rows: Any = RandomRows(model.vocab_size, model.sequence_len)
    bare = BareLoop(copy.copy(recipe), StepRows(rows, ROWS_PER_STEP))
    train(recipe, rows, bare, checkpoint_every_steps=10**6)
    # The last step writes a resume file; the first ones compile.
    pairs = bare.pairs[WARM_UP_STEPS:-1]
    ratios = [trainer / alone for trainer, alone in pairs]
    tokens = ROWS_PER_STEP * model.sequence_len
    found = {
        "settings": {"depth": options.depth, "compute_dtype": model.compute_dtype, "compiled": not options.eager},
        "Trainer / bare loop": spread(ratios),
        "95% interval of its median": interval(ratios),
        "tokens a second": {
            name: spread([tokens / seconds for seconds in times])
            for name, times in zip(("Trainer", "bare loop"), zip(*pairs, strict=True), strict=True)
        },
    }
    report("trainer", len(pairs), found)


if __name__ == "__main__":
    main()
