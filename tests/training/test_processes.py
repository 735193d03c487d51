"""One training on several processes: the rows, the figures and the files of the same command on one."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat_pl.training.resume import resume_files
from tests.training.conftest import same_weights, sft_overrides, tiny_overrides, weights_of
from tests.training.launch import launch

# Two rows a step, one in memory at once: a sum over processes has the two terms of the sum over micro-batches.
TWO_ROWS = ("total_batch_tokens=64", "device_batch_size=1", "max_steps=12", "evaluation.every_steps=6")
EIGHT_ROWS = ("total_batch_tokens=256", "device_batch_size=2", "max_steps=24", "model.compute_dtype=float32")


def command(place: Path, run: str, *overrides: str, stage: str = "base") -> list[str]:
    settings = tiny_overrides(place) if stage == "base" else sft_overrides(place)
    return ["train", f"run={run}", *settings, *overrides]


def new_run(place: Path, run: str, stage: str = "base") -> Path:
    """A run with what the stage builds on."""
    folder = place / "runs" / run
    for parent in ("tokenizer", "base") if stage == "sft" else ("tokenizer",):
        shutil.copytree(place / "runs" / "whole" / parent, folder / parent)
    return folder


def rewound(place: Path, run: str, to: str, step: int, stage: str = "base") -> Path:
    """A copy of a run as it was when the resume file of a step was its newest."""
    folder = place / "runs" / to
    shutil.copytree(place / "runs" / run, folder)
    for path in (folder / stage / "bundle", *(folder / stage).glob("finished.json")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    newest, *others = [path for path in resume_files(folder / stage / "checkpoints") if f"{step:06d}" in path.name]
    assert not others
    for path in set(resume_files(newest.parent)) - {newest}:
        path.unlink()
    return folder


def figures(folder: Path, *names: str) -> list[list[float | None]]:
    """Columns of metrics.csv, a list for each step; each step stands in it once."""
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(n + 1) for n in range(len(rows))]
    return [[float(row[name]) if row[name] else None for name in names] for row in rows]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def trained(processes: int | list[int], arguments: list[str]) -> str:
    """Train on several processes; what was printed on stdout."""
    done = launch(processes, arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def on_one(place: Path) -> Callable[..., Path]:
    """The folder of a run on one process, in this one; trained once for each set of settings."""
    from nanochat_pl.cli.main import main

    def train(run: str, *overrides: str, stage: str = "base") -> Path:
        if not (folder := place / "runs" / run).exists():
            new_run(place, run, stage)
            assert main(command(place, run, *overrides, stage=stage)) == 0
        return folder

    return train


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_two_processes_end_with_the_bits_of_one(place: Path, on_one: Callable[..., Path], stage: str) -> None:
    settings = (*TWO_ROWS, "trainer.checkpoint_every_steps=6")
    one, two = on_one(f"one-{stage}", *settings, stage=stage), new_run(place, f"two-{stage}", stage)
    printed = trained(2, command(place, two.name, *settings, stage=stage))
    columns = ("train/loss", "train/tokens", "train/lr_multiplier", "val/bpb", "val/bpb_stderr")
    for ours, theirs in zip(figures(one / stage, *columns), figures(two / stage, *columns), strict=True):
        assert ours[:3] == theirs[:3]
        assert theirs[3:] == pytest.approx(ours[3:], abs=1e-6)
    assert same_weights(weights_of(one, stage), weights_of(two, stage))
    assert files(two / stage) == files(one / stage)
    assert (two / stage / "samples.jsonl").read_text() == (one / stage / "samples.jsonl").read_text()
    lines = [line for line in printed.splitlines() if line]
    assert len(lines) == len(set(lines)) and f"{two.name}/{stage}: validation" in printed, printed
    assert json.loads((two / stage / "plan.json").read_text())["num_devices"]["value"] == 2
    waited = figures(two / stage, "train/communication_seconds", "train/step_seconds")
    assert all(0 < seconds < of_step for seconds, of_step in waited)


def test_a_file_of_one_process_is_gone_on_with_on_two_and_back(
    place: Path, on_one: Callable[..., Path], train: Callable[..., int]
) -> None:
    settings = (*TWO_ROWS, "trainer.checkpoint_every_steps=4", "trainer.keep_last=4")
    whole = on_one("whole-12", *settings)
    two = rewound(place, whole.name, "one-then-two", step=4)
    printed = trained(2, command(place, two.name, *settings))
    assert "going on after step 4" in printed and "processes was 1 and is 2 now" in printed, printed
    assert same_weights(weights_of(whole, "base"), weights_of(two, "base"))
    assert figures(two / "base", "train/loss") == figures(whole / "base", "train/loss")
    back = rewound(place, two.name, "two-then-one", step=8)
    assert train(f"run={back.name}", *settings) == 0
    assert same_weights(weights_of(whole, "base"), weights_of(back, "base"))


def test_a_wrong_setting_is_said_once(place: Path) -> None:
    run = place / "runs" / "wrong"
    done = launch(2, command(place, run.name, "data.path=/nowhere/at/all"))
    assert done.returncode != 0 and done.stdout.count("error") == 0
    assert done.stderr.count("error: ") == done.stderr.count("error: data.path='/nowhere/at/all'") == 1, done.stderr
    assert "exitcode  : 2" in done.stderr and "Traceback" not in done.stderr.partition("torch/distributed")[0]
    assert not run.exists()
