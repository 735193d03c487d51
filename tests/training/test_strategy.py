"""What Lightning's Trainer sees of the device and the processes."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from nanochat_pl.training.strategy import OneDevice, UnwrappedDDP


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
