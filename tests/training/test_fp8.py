"""Training with FP8 that is emulated: it learns as in bfloat16, and what it leaves behind is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanochat_pl.data.batch import StepBatch
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.optim.schedules import ScheduleSettings
from tests.helpers.training import BareModule, fit_tiny

NUM_STEPS = 12


def losses_of_a_training(fp8: bool) -> list[float]:
    """Of two layers of width 128, on new rows each step."""
    settings = ModelSettings(depth=2, aspect_ratio=64, head_dim=64, sequence_len=32)
    net = init_weights(GPT(resolve_model(settings, 64, "bfloat16")).materialise(), seed=0)
    if fp8:
        assert net.enable_fp8("emulate") == 12
    hyper = resolve_hyperparameters(OptimSettings(), width=net.config.width)
    optimizer = build_optimizer(net.named_parameters(), parameter_roles(net), hyper)
    module = BareModule(net, optimizer, ScheduleSettings(warmup_steps=2), NUM_STEPS, device_batch_size=8)
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(NUM_STEPS):
        module.global_step = step
        losses.append(module.step(half_learnable_batch(generator)).loss)
    return losses


def half_learnable_batch(generator: torch.Generator) -> StepBatch:
    """Every other token follows from the one before it."""
    ids = torch.randint(64, (8, 33), generator=generator)
    ids[:, 1::2] = (ids[:, :-1:2] * 5 + 3) % 64
    return StepBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), 8 * 32)


def test_the_losses_are_those_of_bfloat16_within_a_band() -> None:
    plain, fp8 = losses_of_a_training(False), losses_of_a_training(True)
    assert plain[-1] < plain[0] - 0.5, "it learns"
    assert fp8 != plain
    assert fp8 == pytest.approx(plain, abs=0.02)


@pytest.mark.slow
def test_resume_files_do_not_know_of_it_and_a_run_goes_on_without(tmp_path: Path) -> None:
    fit_tiny(tmp_path / "fp8", num_steps=2, recipe={"fp8": "emulate", "compute_dtype": "bfloat16"})
    fit_tiny(tmp_path / "plain", num_steps=2, recipe={"compute_dtype": "bfloat16"})
    names = [
        torch.load(tmp_path / run / "checkpoints" / "step=000002.ckpt", weights_only=True)["state_dict"].keys()
        for run in ("fp8", "plain")
    ]
    assert names[0] == names[1]
    stage = fit_tiny(tmp_path / "fp8", num_steps=4, recipe={"compute_dtype": "bfloat16"})
    assert stage.global_step == 4
