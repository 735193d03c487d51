"""What TensorBoard has of a training besides curves, and the norms that a callback adds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.run_dir import stage_folder
from nanochat_pl.training.callbacks.diagnostics import Diagnostics, norms_by_role
from nanochat_pl.training.callbacks.tensorboard import show_text
from nanochat_pl.training.run import _given_settings
from tests.cli.test_experiments_shrunk import SMALL


@pytest.fixture
def events(here: Path, monkeypatch: pytest.MonkeyPatch) -> EventAccumulator:
    (here / "text.txt").write_text("\n".join(f"Line {i} of a text about {i * 7919 % 1000}." for i in range(2000)))
    diagnostics = ["callbacks=diagnostics", "callbacks.diagnostics.every_steps=2"]
    keys = ["callbacks.diagnostics.histograms_every_steps=2", "evaluation.sample_prompts=['Line `` 1']", "run=x"]
    assert main(["train", *SMALL, *diagnostics, *keys]) == 0
    accumulator = EventAccumulator(str(here / "runs" / "x" / "base" / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_a_training_shows_norms_histograms_samples_charts_and_its_outcome(events: EventAccumulator) -> None:
    tags = events.Tags()
    assert {"weight_norm/matrix", "gradient_norm/wte", "update_ratio/lm_head"} <= set(tags["scalars"])
    assert "final/val/bpb" in tags["scalars"]
    assert "weights/lm_head.weight" in tags["histograms"]
    assert {"samples/text_summary", "custom_scalars__config__"} <= set(tags["tensors"])
    assert b"Line `` 1" in events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0]
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"update to weight" in layout
    assert b"pass@k" not in layout, "a chart without curves"
    (norm,) = events.Scalars("weight_norm/matrix")
    assert norm.step == 2
    assert norm.value > 0
    assert 0 < events.Scalars("update_ratio/matrix")[0].value < 1
    assert {"_hparams_/session_start_info", "_hparams_/experiment"} <= {
        tag for tag in events.summary_metadata if tag.startswith("_hparams_")
    }


def test_a_training_shorter_than_the_cadence_is_measured_at_its_last_step() -> None:
    diagnostics = Diagnostics(every_steps=50)
    trainer = SimpleNamespace(global_step=9, max_steps=10)
    net = torch.nn.Linear(1, 1)
    module = SimpleNamespace(net=net)
    with mock.patch(
        "nanochat_pl.training.callbacks.diagnostics.parameter_roles", lambda net: dict.fromkeys(("weight", "bias"), "x")
    ):
        diagnostics.on_before_optimizer_step(cast("Any", trainer), module, None)
    assert diagnostics._before.keys() == {"weight", "bias"}
    trainer.global_step = 7
    again = Diagnostics(every_steps=50)
    again.on_before_optimizer_step(cast("Any", trainer), module, None)
    assert again._before == {}


def test_norms_of_gradients_are_those_before_clipping() -> None:
    net = torch.nn.Linear(1, 1)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    module = SimpleNamespace(net=net, guard=SimpleNamespace(clip_factor=0.25))
    diagnostics = Diagnostics(every_steps=1)
    with mock.patch(
        "nanochat_pl.training.callbacks.diagnostics.parameter_roles", lambda net: {"weight": "x", "bias": "y"}
    ):
        diagnostics.on_before_optimizer_step(cast("Any", SimpleNamespace(global_step=0, max_steps=9)), module, None)
    assert diagnostics._gradients == {"x": 2.0, "y": 2.0}


def test_norms_are_those_of_all_tensors_of_a_role() -> None:
    tensors = {"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]], dtype=torch.bfloat16), "c": torch.ones(4)}
    assert norms_by_role(tensors, {"a": "x", "b": "x", "c": "y"}) == {"x": 5.0, "y": 2.0}
    assert norms_by_role({}, {}) == {}


@pytest.mark.parametrize("bad", [{"every_steps": 0}, {"histograms_every_steps": -1}])
def test_bad_cadences_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        Diagnostics(**bad)


def test_other_loggers_are_left_alone() -> None:
    show_text([object()], "samples", "text", 1)


def test_settings_whose_record_is_gone_end_no_training(tmp_path: Path) -> None:
    folder = stage_folder(tmp_path, "x", "base")
    assert _given_settings(folder) == {}
    folder.path.mkdir(parents=True)
    (folder.path / "overrides.txt").write_bytes(b"experiment=tiny\n+data.path=\xff=1\n")
    assert _given_settings(folder) == {"experiment": "tiny", "data.path": "\ufffd=1"}
