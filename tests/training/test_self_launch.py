"""Commands that start their own processes: the bits of torchrun, one error, one exit code, a stop for all."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.forked import COMMAND, Forked, run_forked, running
from tests.helpers.launch import MARK, launch
from tests.training.conftest import same_weights, sft_overrides, start_run, tiny_overrides, weights_of

OURS = f"self-launch {os.getpid()}"
STEPS = ("max_steps=6", "evaluation.every_steps=3", "schedule.warmup_steps=2")


def overrides(place: Path, run: str, *further: str) -> list[str]:
    changed = {text.partition("=")[0] for text in (*STEPS, *further)}
    kept = [text for text in tiny_overrides(place) if text.partition("=")[0] not in changed]
    return [f"run={run}", *kept, *STEPS, *further]


def started(arguments: list[str]) -> Forked:
    return Forked([*COMMAND, *arguments], capture=True, env={**os.environ, MARK: OURS})


def workers() -> list[int]:
    """The processes that train."""
    return [pid for pid, of in running().items() if "RANK" in of["env"] and of["env"].get(MARK) == OURS]


def wait_for_step(place: Path, run: str, process: Forked) -> None:
    """Until a first resume file is there."""
    deadline = time.monotonic() + 120
    while not [*(place / "runs" / run / "base" / "checkpoints").glob("*.ckpt")]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_two_devices_give_the_bits_of_torchrun_with_two_processes(place: Path) -> None:
    for run in ("self", "torchrun"):
        start_run(place, run, "base")
    done = run_forked([*COMMAND, "train", *overrides(place, "self", "trainer.devices=2")])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Training on 2 processes" in done.stdout and done.stdout.count("Next:") == 1 and done.stderr == ""
    by_torchrun = launch(2, ["train", *overrides(place, "torchrun")])
    assert by_torchrun.returncode == 0, by_torchrun.stderr
    ours, theirs = (weights_of(place / "runs" / run, "base") for run in ("self", "torchrun"))
    assert same_weights(ours, theirs)
    again = run_forked([*COMMAND, "train", *overrides(place, "self", "trainer.devices=2")])
    assert again.returncode == 0 and "is finished" in again.stdout and "2 processes" not in again.stdout


@pytest.mark.slow
def test_an_error_is_said_once_with_the_exit_code_of_one(place: Path) -> None:
    done = run_forked([*COMMAND, "train", *overrides(place, "wrong", "trainer.devices=2", "data.path=/nowhere")])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: data.path='/nowhere': there is no such")


@pytest.mark.slow
def test_a_process_that_dies_ends_the_command_and_the_other_one(place: Path) -> None:
    start_run(place, "killed", "base")
    process = started(["train", *overrides(place, "killed", "trainer.devices=2", "max_steps=100000")])
    wait_for_step(place, "killed", process)
    pids = workers()
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL, out + err
    assert err.count("error: ") == 1 and "ended by signal 9 (SIGKILL)" in err
    assert not workers()


@pytest.mark.slow
def test_a_stop_reaches_all_and_a_second_one_ends_them(place: Path) -> None:
    start_run(place, "stopped", "base")
    command = ["train", *overrides(place, "stopped", "trainer.devices=2", "max_steps=100000")]
    process = started(command)
    wait_for_step(place, "stopped", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT, out + err
    assert "Stopped after step" in out and "Traceback" not in err
    process = started(command)
    time.sleep(8)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    # 143 to a shell in both cases: where loading took longer than eight seconds, nothing had been begun.
    assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)


@pytest.mark.slow
def test_every_stage_of_a_pipeline_starts_its_processes(place: Path, tmp_path: Path) -> None:
    """Each step of a pipeline is a program of its own."""
    (tmp_path / "two.yaml").write_text("pipeline: [tokenizer, base, sft]\n", encoding="utf-8")
    own = ["max_steps=2", "trainer.devices=2", f"paths.runs={tmp_path}"]
    replaced = ("stage", "max_steps", "paths.runs")
    keys = [text for text in {*tiny_overrides(place), *sft_overrides(place)} if not text.startswith(replaced)]
    done = run_forked([*COMMAND, "pipeline", f"experiment={tmp_path / 'two.yaml'}", "run=two", *own, *keys])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Training on 2 processes") == 2 and done.stdout.count("Next:") == 1
