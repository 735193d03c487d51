"""Stops and resumes: whatever ends a run, the same command brings it to the same bits."""

from __future__ import annotations

import csv
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nanochat_pl.training.resume import damage, newest_resume_file, resume_files
from tests.small_disk import small_disk
from tests.training.conftest import same_weights, sft_overrides, tiny_overrides, weights_of


def command(place: Path, run: str, stage: str) -> list[str]:
    settings = tiny_overrides(place) if stage == "base" else sft_overrides(place)
    return [sys.executable, "-m", "nanochat_pl.cli.main", "train", f"run={run}", *settings]


def start_run(place: Path, run: str, stage: str) -> Path:
    """A new run with what the stage builds on."""
    folder = place / "runs" / run
    shutil.copytree(place / "runs" / "whole" / "tokenizer", folder / "tokenizer")
    if stage == "sft":
        shutil.copytree(place / "runs" / "whole" / "base", folder / "base")
    return folder


def interrupt(arguments: list[str], when: Callable[[], bool], signum: int) -> int:
    """Run a command until ``when``, send the signal, give the exit code."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=_heed_ctrl_c)
    deadline = time.monotonic() + 120
    while process.poll() is None and not when():
        assert time.monotonic() < deadline, "it never came to the point where it is interrupted"
        time.sleep(0.001)
    process.send_signal(signum)
    process.communicate(timeout=60)
    return process.returncode


def _heed_ctrl_c() -> None:
    """Tests that run in the background of a shell inherit that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def metrics_of(run: Path, stage: str) -> list[tuple[str, ...]]:
    """Steps with the figures that do not depend on the clock."""
    with (run / stage / "metrics.csv").open(encoding="utf-8", newline="") as file:
        names = ("step", "train/loss", "train/loss_smoothed", "train/lr_multiplier", "train/tokens", "val/bpb")
        return [tuple(row[name] for name in names) for row in csv.DictReader(file)]


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


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_an_exact_file(place: Path, train: Callable[..., int], signum: int) -> None:
    """The exit code is 128 + signal (a pipeline must not go on), and nothing of the finished steps is lost."""
    folder = start_run(place, f"stopped-{signum}", "base")
    begun = folder / "base" / "metrics.csv"
    code = interrupt(
        command(place, folder.name, "base"), lambda: begun.exists() and begun.read_text().count("\n") > 3, signum
    )
    assert code == 128 + signum
    newest = newest_resume_file(folder / "base" / "checkpoints")
    assert newest is not None
    assert train(f"run={folder.name}") == 0
    assert same_weights(weights_of(place / "runs" / "whole", "base"), weights_of(folder, "base"))


def test_killed_before_the_first_file_it_starts_over(place: Path, train: Callable[..., int]) -> None:
    folder = start_run(place, "early", "base")
    code = interrupt(command(place, "early", "base"), (folder / "base" / "plan.json").exists, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert train("run=early") == 0
    assert same_weights(weights_of(place / "runs" / "whole", "base"), weights_of(folder, "base"))


@pytest.mark.slow
def test_two_threads_and_compiled_kill_9_changes_nothing(place: Path) -> None:
    """As a person trains: threads that add to one row of an embedding must not do so in the order they come."""
    settings = ["trainer.compile=true", "trainer.num_threads=2", "model.compute_dtype=bfloat16", "max_steps=30"]
    run_whole = start_run(place, "compiled", "base")
    subprocess.run([*command(place, "compiled", "base"), *settings], check=True, capture_output=True)
    folder = start_run(place, "compiled-killed", "base")
    checkpoints = folder / "base" / "checkpoints"
    arguments = [*command(place, "compiled-killed", "base"), *settings]
    assert interrupt(arguments, lambda: any(checkpoints.glob("step=*.ckpt")), signal.SIGKILL) == -signal.SIGKILL
    subprocess.run(arguments, check=True, capture_output=True)
    assert same_weights(weights_of(run_whole, "base"), weights_of(folder, "base"))


def test_killed_after_the_last_step_it_only_writes_the_bundle(place: Path, train: Callable[..., int]) -> None:
    folder = start_run(place, "late", "base")
    shutil.copytree(place / "runs" / "whole" / "base", folder / "base")
    shutil.rmtree(folder / "base" / "bundle")
    (folder / "base" / "finished.json").unlink()
    assert train("run=late") == 0
    whole = place / "runs" / "whole"
    assert same_weights(weights_of(whole, "base"), weights_of(folder, "base"))
    assert metrics_of(whole, "base") == metrics_of(folder, "base")


def test_device_batch_size_may_change_on_the_way(place: Path, train: Callable[..., int]) -> None:
    """It is a matter of memory: the sums are taken in another order, and that is all."""
    folder = start_run(place, "other-size", "base")
    assert train("run=other-size", "device_batch_size=3", "trainer.checkpoint_every_steps=20") == 0
    whole, other = weights_of(place / "runs" / "whole", "base"), weights_of(folder, "base")
    loss = [float(row[1]) for row in metrics_of(place / "runs" / "whole", "base")]
    other_loss = [float(row[1]) for row in metrics_of(folder, "base")]
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


def test_loader_workers_give_the_same_bits(place: Path, train: Callable[..., int]) -> None:
    folder = start_run(place, "workers", "base")
    assert train("run=workers", "trainer.num_workers=1") == 0
    assert same_weights(weights_of(place / "runs" / "whole", "base"), weights_of(folder, "base"))


def test_an_ignored_signal_stays_ignored(place: Path) -> None:
    """nohup: the training goes on when its terminal is gone."""
    folder = start_run(place, "nohup", "base")
    begun = folder / "base" / "metrics.csv"
    arguments = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *command(place, "nohup", "base")]
    assert interrupt(arguments, lambda: begun.exists() and begun.read_text().count("\n") > 3, signal.SIGHUP) == 0


def test_a_damaged_newest_file_is_passed_over(tmp_path: Path) -> None:
    for step in (5, 10):
        torch.save({"step": step, "weights": torch.ones(100)}, tmp_path / f"step={step:06d}.ckpt")
    newest = tmp_path / "step=000010.ckpt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    newest.write_bytes(bytes(data))
    assert damage(newest) is not None
    with pytest.warns(UserWarning, match="step=000010"):
        assert newest_resume_file(tmp_path) == tmp_path / "step=000005.ckpt"
    assert not newest.exists(), "else the run would not write this step again"


def test_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    (tmp_path / "step=000005.ckpt.tmp.123").write_bytes(b"half")
    assert newest_resume_file(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_steps_are_numbers_and_not_names(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 20):
        torch.save({}, tmp_path / f"step={step:06d}.ckpt")
    (tmp_path / "step=best.ckpt").touch()
    assert [path.name for path in resume_files(tmp_path)] == [
        "step=1000000.ckpt",
        "step=999999.ckpt",
        "step=000020.ckpt",
    ]


def test_every_resume_file_is_plain_data(place: Path) -> None:
    files = resume_files(place / "runs" / "whole" / "base" / "checkpoints")
    assert len(files) == 2, "trainer.keep_last"
    for path in files:
        assert torch.load(path, weights_only=True)["global_step"] == int(path.stem.split("=")[1])


@pytest.fixture
def full_disk(place: Path) -> Iterator[Path]:
    """The folder of a base stage on a disk of 1.5 MB."""
    folder = start_run(place, "full", "base") / "base"
    with small_disk(folder, "1500k"):
        yield folder
    shutil.rmtree(folder.parent)


def test_a_disk_that_is_too_small_ends_the_run_before_it_begins(
    full_disk: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("run=full") == 2
    assert "MiB free" in capsys.readouterr().err
    assert not (full_disk / "metrics.csv").exists()


def test_a_disk_that_fills_up_costs_no_file(
    full_disk: Path,
    train: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nanochat_pl.training.limits.free_bytes", lambda path: 2**40)
    assert train("run=full") == 2
    error = capsys.readouterr().err
    assert "step=0000" in error and "MiB free" in error
    assert all(damage(path) is None for path in resume_files(full_disk / "checkpoints"))
