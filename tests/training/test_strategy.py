"""What Lightning's Trainer sees of the device and the processes."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from nanochat_pl.training.strategy import Launched, OneDevice, UnwrappedDDP


@pytest.mark.parametrize("kind", [OneDevice, UnwrappedDDP])
def test_model_and_optimizer_stay_on_their_device_after_a_fit(
    kind: type[OneDevice] | type[UnwrappedDDP],
) -> None:
    """Lightning moves both to the CPU, where the final validation would then run. ``meta`` stands for a GPU."""
    device = torch.device("meta")
    module = LightningModule()
    module.weight = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.AdamW(module.parameters())
    module.weight.grad = torch.ones_like(module.weight)
    optimizer.step()
    strategy = kind(device)
    trainer = Trainer(accelerator="cpu", strategy=strategy, logger=False, enable_checkpointing=False)
    strategy.connect(module)
    strategy.optimizers = [optimizer]
    trainer._teardown()
    state = optimizer.state[module.weight]
    assert {module.weight.device, state["exp_avg"].device} == {device}


def test_one_process_under_slurm_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning took the tasks of the job for processes of this training, and refused them or wrote no events."""
    for variable, value in {
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_JOB_NAME": "train",
        "SLURM_LOCALID": "0",
    }.items():
        monkeypatch.setenv(variable, value)
    device = torch.device("cpu")
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=OneDevice(device),
        plugins=[Launched()],
        logger=False,
        enable_checkpointing=False,
    )
    assert trainer.world_size == 1 and trainer.global_rank == 0 and rank_zero_only.rank == 0
