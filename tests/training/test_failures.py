"""One of two processes fails: the launcher ends the other, its error comes first, and the same command goes on."""

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


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_other(rank: int, place: Path, expected: Path, train: Callable[..., int]) -> None:
    """The launcher says which one. What the collective of the other says of it is no bug."""
    # The file of step 5 is written while the next steps are made.
    done = failed(place, f"killed-{rank}", f"is_killed {rank} 7", seconds=0 if rank else 1)
    assert "exitcode  : -9" in done.stderr and "bug in nanochat_pl" not in done.stderr
    assert all(line.startswith(f"process {1 - rank}: ") for line in errors(done))
    check_goes_on(place, f"killed-{rank}", expected, train)


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
@pytest.mark.parametrize(
    ("fault", "rank", "first", "code"),
    [
        ("is_refused", 1, "error: a file of this process alone cannot be read.", 2),
        ("fails", 0, "Traceback (most recent call last):", 1),
    ],
)
def test_the_error_of_one_process_is_on_top(
    place: Path, expected: Path, train: Callable[..., int], fault: str, rank: int, first: str, code: int
) -> None:
    """What it has said, torchrun repeats where it was a bug."""
    done = failed(place, fault, f"{fault} {rank} 7")
    assert errors(done)[0] == f"process {rank}: {first}"
    assert done.stderr.count("bug in nanochat_pl") == (fault == "fails")
    assert "root_cause" in done.stderr.lower().replace(" ", "_") and f"exitcode  : {code}" in done.stderr
    assert ("ZeroDivisionError: a fault" in done.stderr.partition("Root Cause")[2]) == (fault == "fails")
    check_goes_on(place, fault, expected, train)


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
