"""Stops of several processes: one that has heard of it is enough, all end at the same place, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat_pl.cli.main import _end_alone as end_alone
from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import LostContact, UserError
from nanochat_pl.common.schema import build
from nanochat_pl.training.callbacks import graceful_stop
from nanochat_pl.training.callbacks.graceful_stop import GracefulStop
from nanochat_pl.training.checkpoint.resume import newest_resume_file
from nanochat_pl.training.config import TrainerSettings
from nanochat_pl.training.module import LMModule
from tests.helpers.faults import MODULE
from tests.helpers.forked import Forked
from tests.helpers.launch import Launched, launch, launched
from tests.helpers.processes import run
from tests.helpers.stop_jobs import check_once, wait_for_rows
from tests.training.conftest import same_weights, tiny_overrides, weights_of

REPOSITORY = Path(__file__).resolve().parents[2]
SLOW = {"NANOCHAT_PL_TEST_SECONDS": "0.2"}
# Two rows a step, one of each process: the sum has the two terms of one process, and the same bits.
TWO_ROWS = ["total_batch_tokens=64", "device_batch_size=1", "evaluation.every_steps=7"]


def arguments(place: Path, run: str, *overrides: str) -> list[str]:
    """A run of forty steps, which has its tokenizer."""
    folder = place / "runs" / run
    if not folder.exists():
        shutil.copytree(place / "runs" / "whole" / "tokenizer", folder / "tokenizer")
    return ["train", f"run={run}", *tiny_overrides(place), *TWO_ROWS, "trainer.checkpoint_every_steps=1000", *overrides]


def not_stopped(place: Path) -> Path:
    """The run that nobody stopped, on one process."""
    assert main(arguments(place, "not-stopped")) == 0
    return place / "runs" / "not-stopped"


@pytest.fixture(scope="module")
def expected(place: Path) -> Path:
    return not_stopped(place)


def wait_until(condition: Callable[[], object], run: Launched) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert all(agent.poll() is None for agent in run.agents) and time.monotonic() < deadline, run.printed()
        time.sleep(0.02)


def has_made(place: Path, run: str, steps: int) -> Callable[[], bool]:
    metrics = place / "runs" / run / "base" / "metrics.csv"
    return lambda: metrics.exists() and metrics.read_text().count("\n") > steps + 1  # header, step 0


def stopped(
    place: Path,
    tmp_path: Path,
    run: str,
    to: str,
    signum: int,
    after: int = 3,
    waits: Mapping[str, str] = SLOW,
    overrides: Sequence[str] = (),
) -> str:
    """Train on two processes, send a signal in the middle; gives what was printed.

    Args:
        to: who gets it: the agent of torchrun, one worker, all workers.
        after: so many steps have their line of metrics; that of the last one is written with the next.
        waits: what takes long, for tests.helpers.faults.
    """
    env = {"NANOCHAT_PL_TEST_CODES": str(tmp_path), **waits}
    with launched(2, arguments(place, run, *overrides), env, cwd=REPOSITORY, module=MODULE) as launch:
        wait_until(has_made(place, run, after), launch)
        workers = launch.workers()
        assert sorted(workers) == [0, 1]
        for pid in {"agent": [launch.agents[0].pid], "one": [workers[1]], "all": list(workers.values())}[to]:
            os.kill(pid, signum)
        launch.wait()
        return launch.printed()


def check_stopped_and_resumed(
    place: Path, tmp_path: Path, expected: Path, train: Callable[..., int], run: str, signum: int
) -> None:
    codes = {path.name: int(path.read_text()) for path in tmp_path.iterdir()}
    assert codes == {"0": 128 + signum, "1": 128 + signum}
    folder = place / "runs" / run
    assert newest_resume_file(folder / "base" / "checkpoints") is not None
    assert not (folder / "base" / "finished.json").exists()
    assert train(*arguments(place, run)[1:]) == 0
    assert same_weights(weights_of(expected, "base"), weights_of(folder, "base"))


def test_a_signal_to_one_process_stops_all(
    place: Path, tmp_path: Path, expected: Path, train: Callable[..., int]
) -> None:
    """SIGUSR1, which torchrun does not pass on, to the process of rank 1."""
    printed = stopped(place, tmp_path, "stop-one", "one", signal.SIGUSR1)
    check_stopped_and_resumed(place, tmp_path, expected, train, "stop-one", signal.SIGUSR1)
    assert printed.count("Stopping after this micro-batch") == printed.count("Stopped after step") == 1, printed
    assert printed.count("exitcode  : 138") >= 1, printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "to"),
    [(signal.SIGINT, "all"), (signal.SIGTERM, "agent"), (signal.SIGTERM, "one"), (signal.SIGHUP, "agent")],
)
def test_any_signal_to_anyone(
    place: Path, tmp_path: Path, expected: Path, train: Callable[..., int], to: str, signum: int
) -> None:
    """But SIGUSR1 to torchrun, which dies of it; to a process it is above."""
    run = f"stop-{to}-{signum}"
    stopped(place, tmp_path, run, to, signum)
    check_stopped_and_resumed(place, tmp_path, expected, train, run, signum)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "after", "waits"),
    [
        ("validation", 7, {"NANOCHAT_PL_TEST_VALIDATION_SECONDS": "6"}),
        ("rows", 4, {"NANOCHAT_PL_TEST_ROWS": "5"}),  # they are asked for one step ahead
    ],
)
def test_a_signal_where_the_training_waits(
    place: Path,
    tmp_path: Path,
    expected: Path,
    train: Callable[..., int],
    where: str,
    after: int,
    waits: Mapping[str, str],
) -> None:
    """Between two batches of a validation, and while the rows of the next step are not there."""
    printed = stopped(place, tmp_path, f"stop-{where}", "one", signal.SIGUSR1, after - 1, waits)
    assert f"Stopped after step {after}" in printed
    check_stopped_and_resumed(place, tmp_path, expected, train, f"stop-{where}", signal.SIGUSR1)


@pytest.mark.slow
def test_signals_to_processes_with_loaders(
    place: Path, tmp_path: Path, expected: Path, train: Callable[..., int]
) -> None:
    """torchrun signals the whole group of each worker, its loader processes too: the stop still needs them."""
    loaders = "trainer.num_workers=1"
    stopped(place, tmp_path, "stop-loaders", "agent", signal.SIGTERM, overrides=[loaders])
    check_stopped_and_resumed(place, tmp_path, expected, train, "stop-loaders", signal.SIGTERM)


@pytest.mark.slow
def test_a_second_signal_ends_at_once(place: Path, tmp_path: Path) -> None:
    """It makes no file. The first came in the middle of a long step."""
    env = {"NANOCHAT_PL_TEST_SECONDS": "5"}
    with launched(2, arguments(place, "stop-twice"), env, cwd=REPOSITORY, module=MODULE) as launch:
        wait_until(has_made(place, "stop-twice", 1), launch)
        first = launch.workers()[0]
        while launch.agents[0].poll() is None and first in launch.workers().values():
            os.kill(first, signal.SIGUSR1)
            time.sleep(0.6)
        launch.wait()
        assert f"exitcode  : {128 + signal.SIGUSR1}" in launch.printed()
        assert newest_resume_file(place / "runs" / "stop-twice" / "base" / "checkpoints") is None


@pytest.mark.slow
def test_closing_the_terminal_keeps_the_run(place: Path, expected: Path, train: Callable[..., int]) -> None:
    """What is then said has no reader; it is a stop as any other."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    command = ["-m", MODULE, *arguments(place, "closed")]
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "on_terminal": True}
    process = Forked(command, env={**os.environ, **SLOW}, cwd=REPOSITORY, **terminal)
    os.close(theirs)
    printed = b""
    try:
        deadline = time.monotonic() + 240
        while not has_made(place, "closed", 3)():
            assert process.poll() is None and time.monotonic() < deadline, printed.decode()
            with contextlib.suppress(BlockingIOError):
                printed += os.read(ours, 65536)  # or else it waits for a reader
            time.sleep(0.02)
        os.close(ours)
        assert process.wait(timeout=240) == 128 + signal.SIGHUP
    finally:
        process.kill()
    assert newest_resume_file(place / "runs" / "closed" / "base" / "checkpoints") is not None
    assert train(*arguments(place, "closed")[1:]) == 0
    assert same_weights(weights_of(expected, "base"), weights_of(place / "runs" / "closed", "base"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compilers_and_loaders_end_no_training(place: Path) -> None:
    """Their ends are signals, too: of the loader that ends with the training, of each compiler that is started."""
    overrides = [
        "trainer.num_workers=1",
        "trainer.compile=true",
        "model.depth=1",
        "max_steps=3",
        "evaluation.every_steps=2",
    ]
    env = {**SLOW, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = launch(2, arguments(place, "compilers", *overrides), env, cwd=REPOSITORY, timeout=1000, module=MODULE)
    assert done.returncode == 0, done.stderr
    assert (place / "runs" / "compilers" / "base" / "finished.json").exists()


def test_max_time(
    place: Path,
    expected: Path,
    train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It stops as on a signal, with the exit code of SIGALRM; the time is that of each start."""
    clock, whole = SimpleNamespace(seconds=0.0), LMModule.training_step

    def step_of_a_second(*given: Any) -> Any:
        clock.seconds += 1
        return whole(*given)

    with monkeypatch.context() as patch:
        patch.setattr(LMModule, "training_step", step_of_a_second)
        patch.setattr(graceful_stop, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
        assert train(*arguments(place, "timed", "trainer.max_time=00:00:00:09")[1:]) == 142
    assert "trainer.max_time is over. Stopping" in capfd.readouterr().err
    newest = newest_resume_file(place / "runs" / "timed" / "base" / "checkpoints")
    assert newest is not None and newest.name == "step=000009.ckpt"
    assert train(*arguments(place, "timed", "trainer.max_time=01:00:00:00")[1:]) == 0
    assert same_weights(weights_of(expected, "base"), weights_of(place / "runs" / "timed", "base"))


@pytest.mark.parametrize(("text", "seconds"), [("00:00:00:30", 30), ("00:11:30:00", 41_400), ("3:4:05:06", 273_906)])
def test_max_time_in_seconds(text: str, seconds: float) -> None:
    assert TrainerSettings(max_time=text).max_seconds == seconds


@pytest.mark.parametrize("text", ["11:30:00", "2h", "00:24:00:00", "00:00:60:00", "-1:00:00:00", ""])
def test_max_time_of_another_form(text: str) -> None:
    with pytest.raises(UserError, match=f"trainer.max_time={text}: .*00:11:30:00"):
        build(TrainerSettings, {"max_time": text}, "trainer")


def test_a_max_time_of_nothing() -> None:
    with pytest.raises(UserError, match=r"trainer\.max_time=00:00:00:00: is no time at all; .*null"):
        build(TrainerSettings, {"max_time": "00:00:00:00"}, "trainer")


@pytest.mark.parametrize(
    ("what", "ends"),
    [
        (["ready 0", "ready 5", "ready 2"], ["ready"]),
        (["ready 0", "broken 2", "ready 9"], ["no more", "texts.txt: is gone.", "Bring it back."]),
        (["ready 4", "ready 0", "SIGUSR1 2"], ["stop", signal.SIGUSR1, 3]),
        (["broken 2", "SIGTERM 2", "ready 0"], ["stop", signal.SIGTERM, 3]),
    ],
)
def test_processes_wait_for_rows_together(what: list[str], ends: list[object]) -> None:
    """However often each looks: all come back at the same time with the same, and a stop counts more than all else."""
    assert run(3, wait_for_rows, what) == [[*ends, 3]] * 3


def test_the_signals_of_several_processes_are_one() -> None:
    assert run(3, check_once, [0, int(signal.SIGINT), 0]) == [signal.SIGINT] * 3
    assert len(set(run(3, check_once, [int(signal.SIGUSR1), int(signal.SIGTERM), 0]))) == 1
    assert run(3, check_once, [0, 0, 0]) == [0, 0, 0]


def test_who_was_asked_to_stop_leaves_a_lost_contact_to_others(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The launcher ends the others when one has died: that they miss it then is no error of their own."""
    lost, ended = LostContact("Connection reset by peer"), list[int]()
    with pytest.raises(LostContact), GracefulStop(None):  # type: ignore[arg-type]
        raise lost
    assert lost.signum is None
    with pytest.raises(LostContact), GracefulStop(None):  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)
        raise lost
    monkeypatch.setattr(os, "_exit", ended.append)
    end_alone(lost)
    assert ended == [128 + signal.SIGTERM] and "error" not in capfd.readouterr().err
