"""Killed anywhere, the same command goes on to the same bits and metrics, and leaves nothing else behind."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.crash_points import STEP, one_of_each_kind
from tests.helpers.forked import COMMAND, Forked
from tests.training.conftest import sft_overrides, tiny_overrides

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/fd").exists(), reason="needs Linux")

STAGES = ("base", "mid", "sft")
STRIDE = 32
# A first start is that of a run that begins, a second one of a run that goes on after it was killed.
FIVE_STEPS = [
    "max_steps=5",
    "trainer.checkpoint_every_steps=2",
    "trainer.keep_best=1",
    "evaluation.every_steps=2",
    "evaluation.samples_every_steps=2",
    "evaluation.sample_prompts=[a]",
    "evaluation.num_rows=2",
    "evaluation.chat_every_steps=2",  # of sft
    "evaluation.chat.arithmetic.test_size=4",
    "evaluation.chat.identity={}",
    "evaluation.chat_limit_generative=2",
    "evaluation.chat_max_tokens=2",
]


class Trainings:
    """Trains the same stage again and again, each time as another run."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.log = place / "crashes.log"

    def begin(self, run: str, stage: str, start: str = "first") -> Path:
        """The folder of a run with what the stage builds on; of base nothing, it makes its tokenizer on the way."""
        folder = self.place / "runs" / run
        shutil.rmtree(folder, ignore_errors=True)
        if start == "second":
            return shutil.copytree(self.place / "runs" / f"half-{stage}", folder)
        for parent in () if stage == "base" else ("tokenizer", "base"):
            shutil.copytree(self.place / "runs" / "whole" / parent, folder / parent)
        return folder

    def train(
        self,
        run: str,
        stage: str,
        settings: list[str],
        watch: dict[str, Any] | None = None,
        kill_after: float | None = None,
    ) -> int:
        """The exit code, or minus the signal that killed it; ``kill_after`` is in seconds."""
        overrides = tiny_overrides(self.place) if stage == "base" else [*sft_overrides(self.place), f"stage={stage}"]
        program = COMMAND if watch is None else ("-m", "tests.helpers.crash_points", json.dumps(watch))
        with self.log.open("wb") as log:
            training = Forked([*program, "train", f"run={run}", *overrides, *settings], stdout=log, stderr=log)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                training.wait(kill_after)
        finally:
            training.kill()
        return training.wait()

    def crash(self, run: str, stage: str, names: list[str], number: int, start: str = "first") -> Path:
        """A training that is killed at the point with a number among those with these names."""
        folder = self.begin(run, stage, start)
        watch = {"folder": str(folder), "crash_at": [names[number], names[:number].count(names[number])]}
        assert self.train(run, stage, FIVE_STEPS, watch=watch) == -signal.SIGKILL, self.log.read_text("utf-8")
        return folder

    def points(self, stage: str, start: str) -> list[str]:
        """The points that a training comes to, which nobody kills."""
        folder = self.begin(f"uncrashed-{stage}-{start}", stage, start)
        names = self.place / "points.json"
        watch = {"folder": str(folder), "names_to": str(names)}
        assert self.train(folder.name, stage, FIVE_STEPS, watch=watch) == 0, self.log.read_text("utf-8")
        return json.loads(names.read_text(encoding="utf-8"))


def result(folder: Path, stage: str) -> dict[str, Any]:
    """All that a stage ends with, but for times and memory; tensors as the bytes of their files."""
    place = folder / stage
    with (place / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [
            {name: value for name, value in row.items() if not re.search("second|memory|train/mfu", name)}
            for row in csv.DictReader(file)
        ]
    finished = json.loads((place / "finished.json").read_text(encoding="utf-8"))
    return {
        "files": sorted(str(path.relative_to(place)) for path in place.rglob("*")),
        "metrics": rows,
        "samples": (place / "samples.jsonl").read_text(encoding="utf-8"),
        "best": json.loads((place / "checkpoints" / "best.json").read_text(encoding="utf-8")),
        "finished": {key: finished[key] for key in ("step", "metrics", "tokens")},
        "weights": (place / "bundle" / "model.safetensors").read_bytes(),
        "moments": (place / "bundle" / "optimizer.safetensors").read_bytes(),
        "tokenizer": (place / "bundle" / "tokenizer.json").read_bytes(),
    }


@pytest.fixture(scope="module")
def trainings(place: Path) -> Trainings:
    return Trainings(place)


Points = Callable[[str, str], list[str]]


@pytest.fixture(scope="module")
def points(trainings: Trainings) -> Points:
    """The points of a stage by their start, found out once. The second start comes after a kill in the last step."""

    @functools.cache
    def points_of(stage: str, start: str) -> list[str]:
        if start == "second":
            first = points_of(stage, "first")
            last_step = max(i for i, name in enumerate(first) if name == STEP)
            trainings.crash(f"half-{stage}", stage, first, last_step)
        return trainings.points(stage, start)

    return points_of


def assert_all_are_survived(trainings: Trainings, stage: str, start: str, names: list[str], numbers: list[int]) -> None:
    """Killed at each of these points, the same command comes to the same end."""
    expected = result(trainings.place / "runs" / f"uncrashed-{stage}-first", stage)
    for number in numbers:
        folder = trainings.crash(f"crash-{stage}", stage, names, number, start)
        assert trainings.train(folder.name, stage, FIVE_STEPS) == 0, trainings.log.read_text("utf-8")
        found = result(folder, stage)
        other = [key for key in expected if found[key] != expected[key]]
        assert not other, f"killed at point {number}, {names[number]}: other {other}"


@pytest.mark.parametrize(
    ("stage", "start", "which"),
    [
        ("base", "first", 0),
        pytest.param("sft", "second", 1, marks=pytest.mark.slow),
        pytest.param("base", "first", 2, marks=pytest.mark.slow),
        pytest.param("sft", "second", 3, marks=pytest.mark.slow),
        pytest.param("mid", "first", 1, marks=pytest.mark.slow),
        pytest.param("mid", "second", 2, marks=pytest.mark.slow),
    ],
)
def test_killed_at_each_kind_of_point(trainings: Trainings, points: Points, stage: str, start: str, which: int) -> None:
    """A quarter of the kinds in each of four."""
    names = points(stage, start)
    kinds = one_of_each_kind(names)
    assert {"open", "write", "half", "fsync", "rename", "remove", STEP} <= kinds.keys()
    assert_all_are_survived(trainings, stage, start, names, [*kinds.values()][which::4])


@pytest.mark.slow
@pytest.mark.timeout(1500)  # ten times a training that is killed, and the one that goes on with it
def test_killed_at_each_phase_of_writing_a_resume_file(trainings: Trainings, points: Points) -> None:
    """Of the first one, a later one and the last in turn, while the training goes on where it does not wait for it."""
    names = points("base", "first")
    file = re.compile(r"(open|half|fsync|rename) base/checkpoints/step=\d+\.ckpt|(before|after) io\.")
    phases: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        if file.match(name):
            phases.setdefault(re.sub(r"step=\d+", "step=N", name), []).append(number)
    assert {name.split()[0] for name in phases} == {"open", "half", "fsync", "rename", "before", "after"}
    assert {len(numbers) for numbers in phases.values()} == {3}, "files of the steps 2, 4 and 5"
    numbers = [numbers[turn % 3] for turn, numbers in enumerate(phases.values())]  # each phase of one of the files
    assert_all_are_survived(trainings, "base", "first", names, numbers)


@pytest.mark.slow
@pytest.mark.timeout(1500)  # some 10 times a training that is killed, and the one that goes on with it
@pytest.mark.parametrize(("stage", "start"), [("base", "first"), ("mid", "first"), ("sft", "second")])
def test_killed_at_points_all_along_the_way(trainings: Trainings, points: Points, stage: str, start: str) -> None:
    """Every ``STRIDE``-th point, not from the same one each time; with a stride of 1 it is all of them."""
    names = points(stage, start)
    assert len(names) > 100
    first = 10 * STAGES.index(stage)
    assert_all_are_survived(trainings, stage, start, names, list(range(first, len(names), STRIDE)))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_kills_at_random_times(trainings: Trainings) -> None:
    """A longer run is killed again and again on its way."""
    chance = random.Random(0)
    settings = ["evaluation.samples_every_steps=10", "trainer.keep_best=2", "evaluation.every_steps=5"]
    whole = trainings.begin("unkilled", "base")
    assert trainings.train(whole.name, "base", settings) == 0
    kills, turn = 0, 0
    while kills < 5:
        folder, turn = trainings.begin(f"any-time-{turn}", "base"), turn + 1
        while not (folder / "base" / "finished.json").exists():
            code = trainings.train(
                folder.name, "base", settings, kill_after=chance.uniform(0.2, 3) if kills < 5 else None
            )
            assert code in (0, -signal.SIGKILL), trainings.log.read_text("utf-8")
            kills += code != 0
        assert trainings.train(folder.name, "base", settings) == 0
        assert result(folder, "base") == result(whole, "base")
