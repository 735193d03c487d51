"""Processes of one training that are not where, or what, the main process is: told at the start, in words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from nanochat_pl.cli import train as command
from nanochat_pl.cli.train import compose_train, place_of
from nanochat_pl.common.errors import SharedError
from nanochat_pl.common.paths import cache_folder
from nanochat_pl.common.run_dir import StageFolder
from nanochat_pl.distributed import collectives
from nanochat_pl.training import run as training_run
from nanochat_pl.training.device import Machine
from nanochat_pl.training.stage_data import inherit
from nanochat_pl.training.stages.base import Base
from nanochat_pl.training.trainer import _profiler
from tests.helpers.processes import run
from tests.training.conftest import start_run, tiny_overrides


def said(work: Callable[[], Any]) -> str:
    """What all processes are told."""
    try:
        work()
    except SharedError as error:
        return str(error)
    return ""


def see_it_unfinished(arguments: list[str]) -> int:
    """As this process would see the disk a while ago, or another disk."""
    if collectives.is_rank_zero():
        return command.run(arguments)
    with mock.patch.object(StageFolder, "status", "unfinished"):
        return command.run(arguments)


def test_whether_a_stage_is_finished_is_for_the_main_process_to_say(place: Path) -> None:
    """The processes spoke of different things, and one of them ended with a bug of ours."""
    assert run(2, see_it_unfinished, ["run=whole", *tiny_overrides(place)]) == [0, 0]


def see_no_parent(arguments: list[str]) -> str:
    parent = inherit.parent_folder if collectives.is_rank_zero() else lambda config, folder: None
    with mock.patch.object(inherit, "parent_folder", parent):
        return said(lambda: command.run(arguments))


def test_a_parent_that_one_process_does_not_see(place: Path) -> None:
    given = [text for text in tiny_overrides(place) if not text.startswith("tokenizer")]
    folder = start_run(place, "no-parent", "base")
    for told in run(2, see_no_parent, ["run=no-parent", *given]):
        assert "process 1: " in told and "inherits other settings" in told and "paths.runs" in told
    assert not (folder / "base").exists()


def run_an_older_torch(arguments: list[str]) -> str:
    changed = {} if collectives.is_rank_zero() else {"torch": "1.0"}
    with mock.patch.object(command, "what_runs", lambda: {"torch": "9.9", "source of nanochat_pl": "abc", **changed}):
        return said(lambda: command.run(arguments))


def test_other_versions_of_what_runs(place: Path) -> None:
    for told in run(2, run_an_older_torch, ["run=other-versions", *tiny_overrides(place)]):
        assert "process 1: " in told and "runs torch 1.0 (the main process: 9.9)." in told and "abc" not in told
    assert not (place / "runs" / "other-versions").exists()


def go_no_further(*arguments: Any) -> None:
    raise SharedError("it went on")


def train_on(arguments: list[str], of_main: dict[str, Any], of_others: dict[str, Any]) -> str:
    composed = compose_train(arguments)
    own = of_main if collectives.is_rank_zero() else of_others
    machine = Machine(torch.device("cpu"), "CPU", **{"compute_dtype": "float32", "compile": False, **own})
    with contextlib.ExitStack() as patched:
        patched.enter_context(mock.patch.object(training_run, "prepare_machine", lambda config: machine))
        patched.enter_context(mock.patch.object(Base, "prepare", go_no_further))
        cache = cache_folder(composed.config.paths)
        return said(lambda: training_run.train_stage(composed.config, place_of(composed), cache))


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"compile": True}, "cpu in float32, compiled"),
        ({"compute_dtype": "bfloat16"}, "eager"),
        ({"attention": "bands"}, "attention by bands"),
    ],
)
def test_other_choices_of_the_machine(place: Path, others: dict[str, Any], words: str) -> None:
    for told in run(2, train_on, ["run=other-machine", *tiny_overrides(place)], {}, others):
        assert "process 1: " in told and words in told and "cpu in float32, eager" in told
        assert all(key in told for key in ("trainer.compile", "model.compute_dtype", "trainer.attention"))


def test_profiles_of_several_nodes_have_different_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their numbers on a machine are the same."""
    fitting = mock.Mock(folder=tmp_path, trainer=mock.Mock(profiler="simple"))

    def name(rank: int, processes: int) -> str:
        monkeypatch.setattr(collectives, "rank", lambda: rank)
        monkeypatch.setattr(collectives, "world_size", lambda: processes)
        profiler = _profiler(fitting)
        assert profiler is not None
        profiler.setup("fit", local_rank=0)
        return profiler._prepare_filename()

    assert name(0, 1) == "fit-profile-0.txt"
    assert len({name(0, 16), name(8, 16)}) == 2
