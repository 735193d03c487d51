"""Resume files are written while the next steps are made: one at a time, exact, and heard of where they fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.launch_env import LaunchEnv
from nanochat_pl.distributed import collectives
from nanochat_pl.planning.memory import resume_copy_bytes, step_memory
from nanochat_pl.training.callbacks.graceful_stop import GracefulStop
from nanochat_pl.training.callbacks.metrics import StepClock
from nanochat_pl.training.checkpoint import io as checkpoint_io
from nanochat_pl.training.checkpoint import resume
from nanochat_pl.training.checkpoint.io import IN_BACKGROUND, AtomicCheckpointIO, BackgroundCheckpointIO
from nanochat_pl.training.checkpoint.resume import ResumeFiles, damage, resume_files, step_of
from nanochat_pl.training.stage_data import memory_check
from tests.helpers.processes import run
from tests.helpers.training import fit_tiny, tiny_model

write = checkpoint_io._write


def steps_of(folder: Path) -> list[int]:
    return [step_of(path) for path in reversed(resume_files(folder))]


def nothing_is_left(folder: Path) -> bool:
    """No thread and no half file."""
    return not writers() and not list(folder.glob("*.tmp.*"))


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "resume file"]


def wait_for_writer() -> None:
    for thread in writers():
        thread.join()


class Steps(Callback):
    """Counts them; ``events`` has what happened, in its order."""

    def __init__(self) -> None:
        self.made, self.events = 0, list[str]()
        self.then: dict[int, Callable[[], object]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.made = trainer.global_step
        self.events.append(f"step {self.made}")
        self.then.get(self.made, lambda: None)()

    def wait_for(self, step: int) -> None:
        deadline = time.monotonic() + 60
        while self.made < step:
            assert time.monotonic() < deadline, "the training waits for the file"
            time.sleep(0.001)


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch, steps: Steps) -> Callable[[dict[int, int]], None]:
    """Let the file of a step be written only when another step is made."""

    def slowly(until: dict[int, int]) -> None:
        def write_late(checkpoint: dict[str, Any], temporary: Path, path: Path) -> None:
            step = step_of(path)
            steps.events.append(f"writes {step}")
            if step in until:
                steps.wait_for(until[step])
            write(checkpoint, temporary, path)

        monkeypatch.setattr(checkpoint_io, "_write", write_late)

    return slowly


def test_steps_go_on_and_the_file_is_of_its_own_step(
    tmp_path: Path, steps: Steps, slowly: Callable[[dict[int, int]], None]
) -> None:
    """Weights, moments and all else are those of the step: a copy, which later steps do not change."""
    fit_tiny(tmp_path / "plain", num_steps=6, checkpoint_every_steps=2)
    slowly({2: 3, 4: 5})
    fit_tiny(tmp_path / "slow", num_steps=6, checkpoint_every_steps=2, callbacks=[steps])
    assert steps.events.index("writes 2") < steps.events.index("step 3") < steps.events.index("writes 4")
    for step in (2, 4, 6):
        one, other = (
            AtomicCheckpointIO().load_checkpoint(tmp_path / name / "checkpoints" / f"step={step:06d}.ckpt")
            for name in ("plain", "slow")
        )
        assert all(torch.equal(one["state_dict"][name], value) for name, value in other["state_dict"].items())
        moments, others = (each["optimizer_states"][0]["state"] for each in (one, other))
        assert all(
            torch.equal(moments[name][key], value) for name, state in others.items() for key, value in state.items()
        )
    assert nothing_is_left(tmp_path / "slow" / "checkpoints")


def test_a_step_that_was_asked_for_waits_for_the_file_before(
    tmp_path: Path, steps: Steps, slowly: Callable[[dict[int, int]], None]
) -> None:
    slowly({})
    fit_tiny(tmp_path, num_steps=5, checkpoint_every_steps=1, callbacks=[steps])
    assert steps_of(tmp_path / "checkpoints") == [1, 2, 3, 4, 5]


def test_by_time_and_one_at_a_time(
    tmp_path: Path, steps: Steps, slowly: Callable[[dict[int, int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes two minutes, so with 2.5 minutes one is due at every third step. The first is written until step 7
    is made: the next one follows after that, and no step waits."""
    monkeypatch.setattr(resume, "time", SimpleNamespace(monotonic=lambda: 120.0 * steps.made))
    slowly({3: 7})
    steps.then[7] = wait_for_writer
    fit_tiny(
        tmp_path,
        num_steps=14,
        checkpoint_every_steps=None,
        callbacks=[steps],
        trainer={"checkpoint_every_minutes": 2.5},
    )
    found = steps_of(tmp_path / "checkpoints")
    assert found[:2] == [3, 8] and found[-1] == 14


def test_no_file_before_its_time(tmp_path: Path) -> None:
    fit_tiny(tmp_path, num_steps=6, checkpoint_every_steps=None)
    assert steps_of(tmp_path / "checkpoints") == [6], "ten minutes, and the last step"


def test_a_failure_is_raised_at_a_following_step(tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older file is whole, nothing is left of the other, and the same command goes on from the older one."""
    fit_tiny(tmp_path / "whole", num_steps=8, checkpoint_every_steps=2)

    def damaged(temporary: Path, path: Path) -> None:
        steps.wait_for(5)  # with 4 it could fail so early that step 4 still sees it
        raise UserError(f"{path}: what was written cannot be read back.", fix="Check the disk.")

    verify = checkpoint_io._verify
    monkeypatch.setattr(
        checkpoint_io, "_verify", lambda temporary, path: (damaged if step_of(path) == 4 else verify)(temporary, path)
    )
    steps.then[5] = wait_for_writer
    folder = tmp_path / "failing" / "checkpoints"
    with pytest.raises(UserError, match="what was written cannot be read back"):
        fit_tiny(tmp_path / "failing", num_steps=8, checkpoint_every_steps=2, callbacks=[steps])
    assert steps.made == 5, "not at the step itself, nor as late as with the next file"
    assert steps_of(folder) == [2] and damage(resume_files(folder)[0]) is None and nothing_is_left(folder)
    monkeypatch.undo()
    stage = fit_tiny(tmp_path / "failing", num_steps=8, checkpoint_every_steps=2)
    weights = AtomicCheckpointIO().load_checkpoint(tmp_path / "whole" / "checkpoints" / "step=000008.ckpt")
    assert all(torch.equal(weights["state_dict"][name], value) for name, value in stage.state_dict().items())


@pytest.mark.parametrize("error", [ZeroDivisionError, UserError])
def test_an_error_of_the_training_waits_for_the_file(
    tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail() -> None:
        raise error("a fault of the training")

    def write_late(*arguments: Any) -> None:
        steps.wait_for(3)
        time.sleep(0.1)
        write(*arguments)

    monkeypatch.setattr(checkpoint_io, "_write", write_late)
    steps.then[3] = fail
    with pytest.raises(error, match="a fault of the training"):
        fit_tiny(tmp_path, num_steps=8, checkpoint_every_steps=2, callbacks=[steps])
    assert steps_of(tmp_path / "checkpoints") == [2] and nothing_is_left(tmp_path / "checkpoints")


def test_memory_without_room_for_a_copy_makes_the_training_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(checkpoint: dict[str, Any], kept: Any) -> dict[str, Any]:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(checkpoint_io, "copy_to_host", no_room)
    fit_tiny(tmp_path, num_steps=4, checkpoint_every_steps=2)
    assert steps_of(tmp_path / "checkpoints") == [2, 4]


def test_what_others_save_is_there_at_once(tmp_path: Path, steps: Steps) -> None:
    """A callback that calls trainer.save_checkpoint may read the file in the next line."""
    path, there = tmp_path / "mine.ckpt", list[bool]()

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Any, *given: Any) -> None:
            trainer.save_checkpoint(path)
            there.append(path.is_file() and checkpoint_io.wrong_bytes(path) is None)

    fit_tiny(tmp_path, num_steps=2, callbacks=[Saves()])
    assert there == [True, True]


class FakeTrainer:
    """What saving needs of Lightning's: the main process writes, and then all wait for each other."""

    def __init__(self, io: BackgroundCheckpointIO) -> None:
        self.checkpoint_io, self.global_step, self.max_steps = io, 0, 1000
        self.loggers: list[Any] = []
        self.callback_metrics: dict[str, torch.Tensor] = {}

    def save_checkpoint(self, path: Path, weights_only: bool, storage_options: str) -> None:
        if collectives.is_rank_zero():
            self.checkpoint_io.save_checkpoint({"weights": torch.ones(10)}, path, storage_options)
        collectives.barrier()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Files are written once it is set."""
    gate = threading.Event()

    def write_late(*arguments: Any) -> None:
        assert gate.wait(60)
        write(*arguments)

    monkeypatch.setattr(checkpoint_io, "_write", write_late)
    yield gate
    gate.set()


def test_the_older_file_goes_after_the_new_one_is_verified(tmp_path: Path, gate: threading.Event) -> None:
    files = ResumeFiles(tmp_path, 1, 1, StepClock())
    trainer: Any = FakeTrainer(files.io)
    (tmp_path / "step=000001.ckpt").touch()
    trainer.global_step = 2
    files.save(trainer)
    assert files.notice() == resume.NOTHING and steps_of(tmp_path) == [1]
    gate.set()
    files.io.wait()
    assert steps_of(tmp_path) == [1, 2]
    assert files.notice() == resume.NOTHING and steps_of(tmp_path) == [2]


def test_a_file_is_ranked_when_it_is_whole(tmp_path: Path, gate: threading.Event) -> None:
    """Measured before it was written, it put the best one out of its place, and might never have come."""
    files = ResumeFiles(tmp_path, None, 1, StepClock(), keep_best=1, measured_every=1)
    trainer: Any = FakeTrainer(files.io)
    (tmp_path / "step=000001.ckpt").touch()
    for step, bpb in ((1, 2.0), (2, 1.0)):
        trainer.global_step, trainer.callback_metrics = step, {"val/bpb": torch.tensor(bpb)}
        files.save(trainer)
        files.on_validation_end(trainer, None)  # type: ignore[arg-type]
    best = tmp_path / resume.BEST
    assert files.notice() == resume.NOTHING and "000001" in best.read_text() and steps_of(tmp_path) == [1]
    gate.set()
    files.io.wait()
    assert files.notice() == resume.NOTHING and "000002" in best.read_text() and steps_of(tmp_path) == [2]


def test_is_writing_until_it_is_done(tmp_path: Path, gate: threading.Event) -> None:
    io = BackgroundCheckpointIO()
    io.save_checkpoint({"weights": torch.ones(3)}, tmp_path / "step=000001.ckpt", IN_BACKGROUND)
    assert io.is_writing and not steps_of(tmp_path)
    gate.set()
    io.teardown()
    assert not io.is_writing and steps_of(tmp_path) == [1] and nothing_is_left(tmp_path)


def test_a_cpu_needs_room_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step takes alone is not enough: the training would end at its first resume file."""
    config = tiny_model()
    step = step_memory(config, 1, on_cpu=True).total
    monkeypatch.setattr(memory_check, "memory_bytes", lambda device: step + resume_copy_bytes(config) - 1)
    with pytest.raises(UserError, match="of it while a resume file is written"):
        memory_check.require_room(config, torch.device("cpu"), tmp_path, 2)
    monkeypatch.setattr(memory_check, "memory_bytes", lambda device: step + resume_copy_bytes(config))
    memory_check.require_room(config, torch.device("cpu"), tmp_path, 2)


def steps_of_processes(folder: str, minutes: float, fails: bool) -> list[Any]:
    """Steps of a minute each by the clock of the main process; the other's goes a thousand times as fast.

    Returns:
        after which steps this process saved, and the error that ended it with its step.
    """
    now = [0.0]
    resume.time = SimpleNamespace(monotonic=lambda: now[0] * (1 if collectives.is_rank_zero() else 1000))  # type: ignore
    files = ResumeFiles(Path(folder), None, 2, StepClock(), every_minutes=minutes)
    trainer: Any = FakeTrainer(files.io)
    stop = GracefulStop(files)
    stop.setup(trainer, None, "fit")
    if fails:
        checkpoint_io._write = lambda *given: (_ for _ in ()).throw(UserError("the disk is full."))  # type: ignore
    files.on_train_start(trainer, None)  # type: ignore[arg-type]
    saved: list[Any] = []
    try:
        for step in range(1, 9):
            for part in range(2):
                stop._between_micro_batches(part)
            trainer.global_step, now[0] = step, now[0] + 60.0
            if files._is_due:
                saved.append(step)
            files.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
            files.io.wait()
    except UserError as error:
        saved.append(f"{error} after step {trainer.global_step}")
    finally:
        resume.time, checkpoint_io._write = time, write
    return saved


def test_the_main_process_decides_for_all(tmp_path: Path) -> None:
    """All save after the same steps, and hear of a failure at the same step."""
    assert run(2, steps_of_processes, str(tmp_path), 3.0, False) == [[4, 8]] * 2
    assert steps_of(tmp_path) == [4, 8]
    assert run(2, steps_of_processes, str(tmp_path / "full"), 3.0, True) == [[4, "the disk is full. after step 4"]] * 2


def test_sharded_weights_are_not_counted_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsdp is for models that do not fit otherwise; who has several GPUs is told of it. All weights are there at the
    start."""
    config, gpu = tiny_model(), torch.device("cuda")
    monkeypatch.setattr(memory_check, "launch_env", lambda: LaunchEnv(0, 8, 0, 8))
    monkeypatch.setattr(memory_check, "gpu_memory_bytes", lambda device: 2**34)
    whole = memory_check.min_memory(config, gpu)
    step = step_memory(config, 1, on_cpu=False, processes=8, gpu_memory=2**34)
    sharded = memory_check.min_memory(config, gpu, sharded=True)
    assert sharded == max(whole - (step.weights + step.gradients) * 7 // 8, step.weights + step.libraries) < whole
    monkeypatch.setattr(memory_check, "memory_bytes", lambda device: whole - 1)
    with pytest.raises(UserError) as told:
        memory_check.require_room(config, gpu, tmp_path, 2)
    assert "trainer.strategy=fsdp" in told.value.fix and "stage=base model.depth" in told.value.fix
    memory_check.require_room(config, gpu, tmp_path, 2, sharded=True)
