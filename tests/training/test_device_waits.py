"""How often a step waits for its device, how it gets its rows there, and how many graphs a training compiles."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch.overrides import TorchFunctionMode

from nanochat_pl.cli.main import main
from nanochat_pl.data.batch import StepBatch
from nanochat_pl.model.loss import compiled_piece
from nanochat_pl.training.callbacks.metrics import StepMetrics
from tests.helpers import apple_gpu
from tests.helpers.training import fit_tiny
from tests.training.conftest import start_run, tiny_overrides

NUM_STEPS = 6


def test_waits_for_the_played_device_are_counted() -> None:
    with apple_gpu.apple_gpu():
        ones = torch.ones(2, device="mps")
        apple_gpu.waits.clear()
        _ = [
            ones.sum().item(),
            bool(ones.any()),
            ones.nonzero(),
            ones.tolist(),
            ones.cpu(),
            ones.to("cpu"),
            ones[ones > 0],
        ]
    assert apple_gpu.waits == ["_local_scalar_dense"] * 2 + ["nonzero", "tolist", "cpu", "to", "index"]


def test_a_step_waits_for_its_device_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all callbacks, on a device that is played. The first steps also set things up, the last one measures."""
    seen: list[int] = []
    begin = StepMetrics.on_train_batch_start

    def counted(*arguments: Any) -> None:
        seen.append(len(apple_gpu.waits))
        begin(*arguments)

    monkeypatch.setattr(StepMetrics, "on_train_batch_start", counted)
    start_run(place, "waits", "base")
    kept = [text for text in tiny_overrides(place) if not text.startswith(("trainer.", "max_steps", "evaluation."))]
    off = ["evaluation.every_steps=0", "evaluation.samples_every_steps=0", "trainer.checkpoint_every_steps=100"]
    asked = [
        *kept,
        *off,
        "evaluation.at_start=false",
        "evaluation.core_every_steps=null",
        f"max_steps={NUM_STEPS}",
        "optim.max_grad_norm=0.1",
    ]
    with apple_gpu.apple_gpu():
        apple_gpu.waits.clear()
        assert main(["train", "run=waits", *asked, "trainer.compile=false"]) == 0
    assert len(seen) == NUM_STEPS
    of_steps = [apple_gpu.waits[start:end] for start, end in itertools.pairwise(seen[1:])]
    assert of_steps == [["tolist"]] * (NUM_STEPS - 2)


def test_rows_go_to_a_gpu_without_a_wait() -> None:
    """From pinned memory (:class:`RowsDataModule`) while the host goes on."""
    moved = []

    class Watched(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.to:
                moved.append((kwargs or {}).get("non_blocking"))
            return func(*args, **(kwargs or {}))

    batch = StepBatch(torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, 4, dtype=torch.int32), 8)
    with Watched():
        on_device = move_data_to_device(batch, torch.device("meta"))
    assert isinstance(on_device, StepBatch) and on_device.inputs.device.type == "meta"
    assert moved == [True, True]


@pytest.mark.slow
def test_validation_and_samples_compile_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer: what goes into it, the layer, the end, a piece of the loss, and Muon for each shape of a matrix."""
    torch.compiler.reset()
    compiled_piece.cache_clear()
    torch._dynamo.utils.counters.clear()
    graphs, compile_ = [], torch.compile

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_(function, **{**options, "backend": counting})
    )
    stage = fit_tiny(tmp_path, num_steps=5, every_steps=2, compiled=True)
    assert stage.net is not None
    shapes = {tuple(each.shape) for each in stage.net.blocks.parameters()}
    assert len(graphs) == 4 + len(shapes)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(graphs)
    compiled_piece.cache_clear()
    torch.compiler.reset()
