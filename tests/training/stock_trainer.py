"""A stage and our rows in a Trainer as Lightning ships it, on one process or several: a job for
`tests.helpers.processes`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nanochat_pl.common.errors import UserError
from nanochat_pl.distributed import collectives
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.schedules import ScheduleSettings
from nanochat_pl.training.datamodule import RowsDataModule
from nanochat_pl.training.module import LMModule, ModuleConfig
from tests.helpers.training import ROWS_PER_STEP, tiny_model, tiny_rows


class SeenRows(Callback):
    """The numbers of the rows that this process is given, step by step."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.rows.append(list(range(batch.first_row, batch.first_row + len(batch.inputs))))


def fit_stock(folder: str, **arguments: Any) -> dict[str, Any]:
    """Three steps with ``Trainer(strategy="ddp")`` on several processes, else with its default."""
    world = collectives.world_size()
    config = tiny_model(depth=1)
    hyper = resolve_hyperparameters(OptimSettings(compile=False), width=config.width)
    recipe = ModuleConfig(config, 3, ROWS_PER_STEP // 2, hyper, ScheduleSettings(warmup_steps=2), seed=0)
    stage, seen = LMModule(recipe), SeenRows()
    data = RowsDataModule(tiny_rows(Path(folder) / f"cache-{collectives.rank()}"), ROWS_PER_STEP, 3)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    several = {"strategy": "ddp", "devices": world} if world > 1 else {"devices": 1}
    trainer = Trainer(accelerator="cpu", callbacks=[seen], **several, **(quiet | arguments))
    try:
        with warnings.catch_warnings(action="ignore"):
            trainer.fit(stage, data)
    except UserError as error:
        return {"refused": str(error)}
    assert stage.net is not None
    return {"rows": seen.rows, "weights": {name: tensor.clone() for name, tensor in stage.net.state_dict().items()}}


def fit_stock_plain(folder: str, use_distributed_sampler: bool) -> dict[str, Any]:
    """With arguments that go from process to process."""
    torch.manual_seed(0)
    return fit_stock(folder, use_distributed_sampler=use_distributed_sampler)
