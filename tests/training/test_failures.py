"""One of two processes fails: both end within a minute, its error comes first, and the same command goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanochat_pl.training.callbacks.weight_sync import checksums
from nanochat_pl.training.checkpoint.resume import damage, resume_files
from tests.helpers.faults import MODULE
from tests.helpers.launch import launch
from tests.helpers.processes import run
from tests.helpers.stop_jobs import compare_weights
from tests.training.conftest import same_weights, weights_of
from tests.training.test_stops import REPOSITORY, arguments, not_stopped

EVERY_FIVE = "trainer.checkpoint_every_steps=5"


@pytest.fixture(scope="module")
def expected(place: Path) -> Path:
    return not_stopped(place)


def failed(place: Path, run: str, fault: str, *overrides: str, seconds: float = 0) -> subprocess.CompletedProcess[str]:
    """Train on two processes, until the fault comes; each step takes so many seconds at least."""
    env = {"NANOCHAT_PL_TEST_FAULT": fault, "NANOCHAT_PL_TEST_SECONDS": str(seconds)}
    done = launch(2, arguments(place, run, EVERY_FIVE, *overrides), env, cwd=REPOSITORY, module=MODULE)
    assert done.returncode != 0
    return done


def check_goes_on(place: Path, run: str, expected: Path, train: Callable[..., int]) -> None:
    """From the resume file of step 5, which is whole; the end has the bits of the run without a fault."""
    files = resume_files(place / "runs" / run / "base" / "checkpoints")
    assert [path.name for path in files] == ["step=000005.ckpt"] and damage(files[0]) is None
    assert train(*arguments(place, run)[1:]) == 0
    assert same_weights(weights_of(expected, "base"), weights_of(place / "runs" / run, "base"))


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What our processes have written to stderr, without torchrun and its comments."""
    return [line for line in done.stderr.splitlines() if line.startswith(("process ", "error: "))]


def test_a_killed_process_ends_the_other(place: Path, expected: Path, train: Callable[..., int]) -> None:
    """The other one says who is gone, and not what its collective said of it."""
    done = failed(place, "killed", "is_killed 1 7")
    assert errors(done) == ["process 0: ended because process 1 failed: it is gone: killed, or its machine has failed"]
    assert "exitcode  : -9" in done.stderr and "bug in nanochat_pl" not in done.stderr
    check_goes_on(place, "killed", expected, train)


@pytest.mark.slow
def test_weights_that_differ_end_the_training(
    place: Path,
    expected: Path,
    train: Callable[..., int],
) -> None:
    """One bit of one weight on one process: found before the next resume file, which would pass it on."""
    done = failed(place, "flipped", "flips_a_bit 1 10", "trainer.check_processes_every_steps=1000")
    assert len(errors(done)) == 1, done.stderr
    line = errors(done)[0]
    assert "step 10: the processes hold different weights: " in line and "weight; processes 0 | 1" in line
    assert "Traceback" not in done.stderr.partition("torch/distributed")[0]
    check_goes_on(place, "flipped", expected, train)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("fault", "first"),
    [
        ("is_refused", "error: a file of this process alone cannot be read."),
        ("fails", "Traceback (most recent call last):"),
    ],
)
def test_the_error_of_one_process_is_on_top(
    place: Path,
    expected: Path,
    train: Callable[..., int],
    fault: str,
    first: str,
    rank: int,
) -> None:
    done = failed(place, f"{fault}-{rank}", f"{fault} {rank} 7")
    lines = errors(done)
    assert lines[0] == f"process {rank}: {first}"
    assert lines[-1].startswith(f"process {1 - rank}: ended because process {rank} failed: ")
    assert all(line.startswith(f"process {rank}: ") for line in lines[:-1])
    assert done.stderr.count("ZeroDivisionError: a fault") == (2 if fault == "fails" else 0)  # there, and in the end
    assert f"exitcode  : {1 if fault == 'fails' else 2}" in done.stderr
    check_goes_on(place, f"{fault}-{rank}", expected, train)


@pytest.mark.slow
def test_the_main_process_is_killed(place: Path, expected: Path, train: Callable[..., int]) -> None:
    done = failed(place, "main-killed", "is_killed 0 7", seconds=1)  # the file of step 5 is written meanwhile
    assert errors(done)[0].startswith("process 1: ended because process 0 failed: it is gone")
    check_goes_on(place, "main-killed", expected, train)


@pytest.mark.slow
def test_nan_in_the_weights_of_one_process(place: Path, expected: Path, train: Callable[..., int]) -> None:
    """All stop at the same step, before the update, with one message."""
    done = failed(place, "nan", "gets_nan 1 7")
    said = "\n".join(errors(done))
    assert said.startswith("error: step 8: the loss is nan") and said.count("nan. ") == 1, done.stderr
    assert "of process 1" in said and "step=000005.ckpt" in said
    check_goes_on(place, "nan", expected, train)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_bit_of_one_process_is_seen(dtype: str) -> None:
    """All processes raise the same: which weights, which processes."""
    problems = run(3, compare_weights, 1, dtype)
    assert problems == [problems[0]] * 3
    assert "step 2: the processes hold different weights: second; processes 0, 2 | 1 differ" in problems[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64])
def test_checksums_see_minus_zero(dtype: torch.dtype) -> None:
    """A sum of the values would not."""
    zeros = torch.zeros(1000, dtype=dtype)
    before = checksums({"": zeros})
    zeros.view(torch.uint8)[-1] = 0x80
    assert checksums({"": zeros}) != before
