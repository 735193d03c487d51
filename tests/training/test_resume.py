"""Stops and resumes: whatever ends a run, the same command brings it to the same bits."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from nanochat_pl.training.checkpoint.resume import newest_resume_file, resume_files
from tests.helpers.forked import COMMAND, Forked, run_forked
from tests.training.conftest import (
    copy_unfinished,
    metrics_of,
    same_weights,
    sft_overrides,
    start_run,
    tiny_overrides,
    weights_of,
)


def command(place: Path, run: str, stage: str) -> list[str]:
    settings = tiny_overrides(place) if stage == "base" else sft_overrides(place)
    return [*COMMAND, "train", f"run={run}", *settings]


def interrupt(arguments: list[str], when: Callable[[], bool], signum: int, ignored: Sequence[int] = ()) -> int:
    """Run a command until ``when``, send the signal, give the exit code."""
    process = Forked(arguments, ignored=ignored, capture=True)
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and not when():
            assert time.monotonic() < deadline, "it never came to the point where it is interrupted"
            time.sleep(0.001)
        process.send_signal(signum)
        return process.wait(60)
    finally:
        process.kill()


def has_steps(metrics: Path) -> bool:
    """Whether some steps are in the table of a run."""
    return metrics.exists() and metrics.read_text().count("\n") > 3


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_kill_9_changes_nothing(place: Path, train: Callable[..., int], stage: str) -> None:
    """Killed after the second resume file, the same command ends with the bits of the run that nobody killed."""
    folder = start_run(place, f"killed-{stage}", stage)
    checkpoints = folder / stage / "checkpoints"
    code = interrupt(
        command(place, folder.name, stage), lambda: len(list(checkpoints.glob("step=*.ckpt"))) >= 2, signal.SIGKILL
    )
    assert code == -signal.SIGKILL and not (folder / stage / "finished.json").exists()
    assert resume_files(checkpoints)
    assert train(f"run={folder.name}", stage=stage) == 0
    whole = place / "runs" / "whole"
    assert same_weights(weights_of(whole, stage), weights_of(folder, stage))
    assert metrics_of(whole, stage) == metrics_of(folder, stage)


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_leaves_an_exact_file(place: Path, train: Callable[..., int], signum: int) -> None:
    """The exit code is 128 + signal (a pipeline must not go on), and nothing of the finished steps is lost."""
    folder = start_run(place, f"stopped-{signum}", "base")
    begun = folder / "base" / "metrics.csv"
    code = interrupt(command(place, folder.name, "base"), lambda: has_steps(begun), signum)
    assert code == 128 + signum
    newest = newest_resume_file(folder / "base" / "checkpoints")
    assert newest is not None
    assert train(f"run={folder.name}") == 0
    assert same_weights(weights_of(place / "runs" / "whole", "base"), weights_of(folder, "base"))


@pytest.mark.slow
def test_killed_before_the_first_file_it_starts_over(place: Path, train: Callable[..., int]) -> None:
    folder = start_run(place, "killed-early", "base")
    code = interrupt(command(place, "killed-early", "base"), (folder / "base" / "plan.json").exists, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert train("run=killed-early") == 0
    assert same_weights(weights_of(place / "runs" / "whole", "base"), weights_of(folder, "base"))


@pytest.mark.slow
def test_two_threads_and_compiled_kill_9_changes_nothing(place: Path) -> None:
    """As a person trains: threads that add to one row of an embedding must not do so in the order they come."""
    settings = ["trainer.compile=true", "trainer.num_threads=2", "max_steps=12"]
    run_whole = start_run(place, "compiled", "base")
    whole = run_forked([*command(place, "compiled", "base"), *settings])
    assert whole.returncode == 0, whole.stderr
    folder = start_run(place, "compiled-killed", "base")
    checkpoints = folder / "base" / "checkpoints"
    arguments = [*command(place, "compiled-killed", "base"), *settings]
    assert interrupt(arguments, lambda: any(checkpoints.glob("step=*.ckpt")), signal.SIGKILL) == -signal.SIGKILL
    assert run_forked(arguments).returncode == 0
    assert same_weights(weights_of(run_whole, "base"), weights_of(folder, "base"))


def test_killed_after_the_last_step_it_only_writes_the_bundle(place: Path, train: Callable[..., int]) -> None:
    folder = copy_unfinished(place, "late")
    assert train("run=late") == 0
    whole = place / "runs" / "whole"
    assert same_weights(weights_of(whole, "base"), weights_of(folder, "base"))
    assert metrics_of(whole, "base") == metrics_of(folder, "base")


@pytest.mark.slow
def test_device_batch_size_may_change_on_the_way(place: Path, train: Callable[..., int]) -> None:
    """It is a matter of memory: the sums are taken in another order, and that is all."""
    folder = start_run(place, "other-size", "base")
    assert train("run=other-size", "device_batch_size=3", "trainer.checkpoint_every_steps=20") == 0
    whole, other = weights_of(place / "runs" / "whole", "base"), weights_of(folder, "base")
    loss = [float(row[1]) for row in metrics_of(place / "runs" / "whole", "base")[1:]]  # from step 1 on
    other_loss = [float(row[1]) for row in metrics_of(folder, "base")[1:]]
    assert other_loss[0] == pytest.approx(loss[0], abs=1e-6)
    assert other_loss[-1] == pytest.approx(loss[-1], abs=2e-2)
    assert whole.keys() == other.keys()


def test_other_rows_are_another_run(
    place: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A file that is added to data.path while the run stands still would change what every step trains on."""
    folder = start_run(place, "more-text", "base")
    texts = shutil.copytree(place / "texts", tmp_path / "texts")
    checkpoints = folder / "base" / "checkpoints"
    arguments = [*command(place, "more-text", "base"), f"data.path={texts}"]
    assert interrupt(arguments, lambda: any(checkpoints.glob("step=*.ckpt")), signal.SIGKILL) == -signal.SIGKILL
    (texts / "more.txt").write_text("the dog sat on the cat", encoding="utf-8")
    assert train("run=more-text", f"data.path={texts}") == 2
    error = capsys.readouterr().err
    assert "data" in error and "resume=never" in error


@pytest.mark.slow
def test_loader_workers_give_the_same_bits(place: Path, train: Callable[..., int]) -> None:
    folder = start_run(place, "workers", "base")
    assert train("run=workers", "trainer.num_workers=1") == 0
    assert same_weights(weights_of(place / "runs" / "whole", "base"), weights_of(folder, "base"))


def test_an_ignored_signal_stays_ignored(place: Path) -> None:
    """nohup: the training goes on when its terminal is gone."""
    folder = start_run(place, "nohup", "base")
    begun = folder / "base" / "metrics.csv"
    arguments = command(place, "nohup", "base")
    assert interrupt(arguments, lambda: has_steps(begun), signal.SIGHUP, ignored=[signal.SIGHUP]) == 0
