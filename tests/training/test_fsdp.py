"""``trainer.strategy=fsdp``: the steps, files and results of the other strategies, with a part of the weights each."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.training.callbacks.diagnostics import Diagnostics
from nanochat_pl.training.config import StageSettings, TrainConfig, TrainerSettings
from tests.helpers import fsdp_jobs
from tests.helpers.processes import run
from tests.helpers.steps import BATCH, MEMORY, StepLoop, fails

Results = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """What two processes say of each fit, and where the files are."""
    folder = tmp_path_factory.mktemp("fits")
    return folder, run(2, fsdp_jobs.fits, str(folder))


def test_losses_norms_and_validation_are_those_without_shards(results: tuple[Path, Results]) -> None:
    mine, theirs = results[1]
    assert mine["fsdp"]["metrics"] == theirs["fsdp"]["metrics"]
    for name, expected in mine["auto"]["metrics"].items():
        assert len(expected) >= 1
        assert mine["fsdp"]["metrics"][name] == pytest.approx(expected, rel=1e-5), name


def test_each_process_keeps_half_of_the_weights(results: tuple[Path, Results]) -> None:
    mine, theirs = results[1]
    assert mine["fsdp"]["kept"] + theirs["fsdp"]["kept"] == mine["auto"]["kept"]
    odd_rows = 24  # the smear gate has one row, and a few numbers are one each
    assert abs(mine["fsdp"]["kept"] - theirs["fsdp"]["kept"]) <= odd_rows


@pytest.mark.slow
def test_rows_that_three_processes_cannot_divide(tmp_path: Path) -> None:
    mine = run(3, fsdp_jobs.both_strategies, str(tmp_path))[0]
    for name, expected in mine["auto"]["metrics"].items():
        assert mine["fsdp"]["metrics"][name] == pytest.approx(expected, rel=1e-5), name


def test_where_memory_runs_out_in_a_step_the_run_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step cannot be done again: the other processes wait for this one's weights meanwhile."""
    loop = StepLoop(2)
    loop.is_sharded = True
    loop.before_forward = fails(MEMORY, 1)
    with pytest.raises(UserError, match="step 1: out of memory in forward or backward; nothing was changed"):
        loop.step(BATCH)


@pytest.mark.parametrize("run_name", ["fsdp, then auto", "auto, then fsdp"])
def test_a_run_goes_on_with_the_other_strategy(results: tuple[Path, Results], run_name: str) -> None:
    mine, expected = results[1][0][run_name], results[1][0]["auto"]
    for what in ("weights", "moments"):
        assert mine[what].keys() == expected[what].keys()
        for name, tensor in expected[what].items():
            assert mine[what][name].numpy() == pytest.approx(tensor.numpy(), rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_with_compiled_blocks_losses_are_the_same(tmp_path: Path) -> None:
    """Graphs are run as they are: what a compiler makes of them is not the question here."""
    losses = run(2, fsdp_jobs.losses_eager_and_compiled)[0]
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-6)
    assert losses["graphs"] == losses["kinds"]


def test_diagnostics_of_whole_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"callbacks=\[diagnostics\]"):
        Diagnostics().on_fit_start(None, SimpleNamespace(is_sharded=True))  # type: ignore[arg-type]


def test_reinforcement_learning_is_refused() -> None:
    with pytest.raises(UserError, match=r"trainer\.strategy=fsdp: the stage rl writes answers"):
        TrainConfig(stage=StageSettings(name="rl"), trainer=TrainerSettings(strategy="fsdp"))


def test_a_run_of_two_processes_goes_on_with_one(results: tuple[Path, Results]) -> None:
    mine, expected = fsdp_jobs.last_steps_of_one_process(str(results[0])), results[1][0]["auto"]
    assert mine["kept"] == expected["kept"]
    assert mine["metrics"]["train/loss"] == pytest.approx(expected["metrics"]["train/loss"], rel=1e-5)
    for name, tensor in expected["weights"].items():
        assert mine["weights"][name].numpy() == pytest.approx(tensor.numpy(), rel=1e-3, abs=1e-4), name


def test_a_resume_file_is_put_together_once_and_on_one_process() -> None:
    """The main process has all of it in host memory, as the file is written while the training goes on; the others
    never more than their shard and a tensor. It was 4 bytes a parameter more on the main one: a second copy."""
    mine, theirs = run(2, fsdp_jobs.gathering)
    assert mine["names"] > 20 and theirs["names"] == 0
    assert mine["apart"]
    assert mine["peak"] <= mine["all"] + 3 * mine["largest"]
    assert theirs["peak"] <= 3 * theirs["largest"]
