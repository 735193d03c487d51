"""A whole sweep of tiny trainings: killed, run again, one job made to fail; and what the ledger has of it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from nanochat_pl.ledger import newest, read_ledger
from tests.habits.test_hydra import few_steps, wait_until
from tests.helpers.forked import COMMAND, Forked, run_forked
from tests.training.conftest import write_texts

GRID = [f"d1-seed{seed}" for seed in range(3)]


def sweep_of(here: Path, seeds: str = "0,1,2") -> list[str]:
    keys = [text for text in few_steps(here) if not text.startswith("seed")]
    return [*COMMAND, "train", "-m", "stage=base", "model.depth=1", f"seed={seeds}", *keys]


def rows_of(here: Path) -> dict[str, str]:
    """How each run of the ledger ended, by its newest entry."""
    return {entry.run: entry.exit for entry in newest(read_ledger(here / "runs"))}


def numbered(here: Path) -> list[str]:
    (path,) = (here / "runs" / ".sweeps").glob("*/jobs.json")
    return list(json.loads(path.read_text(encoding="utf-8"))["jobs"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_that_is_killed_and_run_again(here: Path) -> None:
    write_texts(here / "texts")
    two = GRID[:2]
    with (here / "log.txt").open("w") as log:
        sweep = Forked(sweep_of(here, "0,1"), stdout=log, stderr=log, cwd=here)
        wait_until(lambda: (here / "runs" / two[1] / "base" / "metrics.csv").exists())
        sweep.send_signal(signal.SIGKILL)
    again = run_forked(sweep_of(here, "0,1"), cwd=here)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"job 1: {GRID[0]}: finished before" in again.stdout
    assert rows_of(here) == dict.fromkeys(two, "finished") and numbered(here) == two
    finished = [entry.run for entry in read_ledger(here / "runs") if entry.exit == "finished"]
    assert sorted(finished) == two, "none twice"
    more = run_forked(sweep_of(here), cwd=here)
    assert more.returncode == 0
    assert numbered(here) == GRID and rows_of(here) == dict.fromkeys(GRID, "finished")
    assert len(read_ledger(here / "runs")) - len(finished) <= 2, "one may be of the stop"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_job_that_fails_stops_none(here: Path) -> None:
    write_texts(here / "texts")
    broken = here / "runs" / GRID[1] / "base"
    broken.mkdir(parents=True)
    (broken / "mine.txt").write_text("of somebody else", encoding="utf-8")
    done = run_forked(sweep_of(here), cwd=here)
    assert done.returncode == 2
    good = [GRID[0], GRID[2]]
    assert rows_of(here) == dict.fromkeys(good, "finished")
    lines = done.stdout.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith(f"{GRID[1]}: failed, exit code 2. The end of "))
    assert "is no folder of a stage" in " ".join(lines[at + 1 :])
    assert "2 of 3 done, 1 failed" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_searches_at_once_share_the_trials_and_one_that_is_killed_is_continued(here: Path) -> None:
    pytest.importorskip("optuna")
    write_texts(here / "texts")
    keys = [text for text in few_steps(here) if not text.startswith(("optim.matrix_lr", "evaluation.every_steps"))]
    space = ["optim.matrix_lr=tag(log,interval(0.001,0.1))", "run=lr", "search.trials=3", "search.random_trials=3"]
    command = [*COMMAND, "search", "stage=base", "model.depth=1", *keys, "search.prune=false", *space]
    with (here / "log.txt").open("w") as log:
        killed = Forked(command, stdout=log, stderr=log, cwd=here)
        wait_until(lambda: (here / "runs" / "lr-trial1" / "base" / "metrics.csv").exists())
        killed.send_signal(signal.SIGKILL)
        workers = [Forked(command, stdout=log, stderr=log, cwd=here) for _ in range(2)]
        codes = [worker.wait(600) for worker in workers]
    assert codes == [0, 0], (here / "log.txt").read_text(encoding="utf-8")
    assert rows_of(here) == {f"lr-trial{n}": "finished" for n in (1, 2, 3)}
    entries = [entry for entry in read_ledger(here / "runs") if entry.exit == "finished"]
    assert len(entries) == len({entry.settings["optim.matrix_lr"] for entry in entries}) == 3
