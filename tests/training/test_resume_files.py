"""Resume files: whole or not there, the damaged passed over, the best kept, what a full disk costs."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import free_bytes, keep_lines_until
from nanochat_pl.common.run_dir import StageFolder
from nanochat_pl.distributed import collectives
from nanochat_pl.training.callbacks import metrics_csv
from nanochat_pl.training.callbacks.metrics import StepClock
from nanochat_pl.training.callbacks.metrics_csv import MetricsCSV
from nanochat_pl.training.checkpoint import io as checkpoint_io
from nanochat_pl.training.checkpoint.io import BackgroundCheckpointIO
from nanochat_pl.training.checkpoint.resume import BEST, ResumeFiles, damage, newest_resume_file, resume_files, step_of
from tests.helpers.processes import run
from tests.helpers.small_disk import small_disk
from tests.training.conftest import copy_unfinished, metrics_of, same_weights, start_run, weights_of


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": _flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "emptied": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("weights", encoding="utf-8"),
    "another archive": lambda path: zipfile.ZipFile(path, "w").close(),
    "another checkpoint": lambda path: torch.save({"model": torch.ones(3)}, path),
    "a folder": _make_folder,
    "a pipe": _make_pipe,
    "another step's": lambda path: shutil.copy(path.with_name("step=000035.ckpt"), path),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_newest_file_is_passed_over(
    what: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(place / "runs" / "whole" / "base" / "checkpoints", tmp_path / "checkpoints")
    newest, older = resume_files(folder)
    DAMAGES[what](newest)
    assert newest_resume_file(folder) == older
    said = capsys.readouterr().out
    assert "step=000040.ckpt is damaged (" in said and "): going on from an older one." in said
    assert not newest.exists(), "else the run would not write this step again"


@pytest.mark.parametrize("what", ["truncated", "zeroed", "deleted"])
def test_a_run_goes_on_from_the_older_file(what: str, place: Path, train: Callable[..., int]) -> None:
    folder = copy_unfinished(place, f"newest-{what.split()[-1]}")
    newest = resume_files(folder / "base" / "checkpoints")[0]
    newest.unlink() if what == "deleted" else DAMAGES[what](newest)
    assert train(f"run={folder.name}") == 0
    assert same_weights(weights_of(place / "runs" / "whole", "base"), weights_of(folder, "base"))
    assert metrics_of(place / "runs" / "whole", "base") == metrics_of(folder, "base")


def test_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path, "r", "base", "r")
    stage.checkpoints.mkdir(parents=True)
    left = ["checkpoints/step=000005.ckpt.tmp.0123456789abcdef", "plan.json.tmp.0123456789abcdef"]
    kept = ["checkpoints/step=000005.ckpt", "notes.tmp.txt"]
    for name in [*left, *kept, ".write-probe.0123456789abcdef"]:
        (stage.path / name).write_bytes(b"half")
    with stage.locked():
        assert {path.name for path in stage.path.rglob("*") if path.is_file()} == {*map(os.path.basename, kept), "lock"}


def _global_generators() -> tuple[Any, ...]:
    state: Any = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), state[1].tolist(), state[2]


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_nothing_depends_on_global_generators(stage: str, place: Path, train: Callable[..., int]) -> None:
    """What draws from them is lost at a resume: they are not in the file."""
    folder = copy_unfinished(place, f"seeds-{stage}", stage)
    resume_files(folder / stage / "checkpoints")[0].unlink()
    torch.manual_seed(123)
    random.seed(123)
    np.random.seed(123)
    before = _global_generators()
    assert train(f"run={folder.name}", stage=stage) == 0
    assert _global_generators() == before
    assert same_weights(weights_of(place / "runs" / "whole", stage), weights_of(folder, stage))


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


def test_a_torn_line_of_figures_is_no_other_step(tmp_path: Path) -> None:
    """Of 12,4.5,… there was 1: a second row of step 1."""
    first = MetricsCSV(tmp_path / "metrics.csv")
    first.rewind(0)
    for step in range(1, 12):
        first.log_metrics({"train/loss": 4.5}, step)
    first.save()
    whole = first.path.read_text(encoding="utf-8")
    first.path.write_text(f"{whole}1", encoding="utf-8")
    again = MetricsCSV(first.path)
    again.rewind(11)
    again.save()
    assert again.path.read_text(encoding="utf-8") == whole


JUNK = [b"\x00\xff,,,junk", b'"', b"3,x" + b"," * (len(metrics_csv.COLUMNS) - 2), b"3,4.5", b"\xb2,1", b"\0" * 100]


@pytest.mark.parametrize("junk", JUNK)
def test_damaged_figures_are_left_out_with_a_word_and_the_others_stay(
    junk: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = MetricsCSV(tmp_path / "metrics.csv")
    first.rewind(0)
    for step in range(1, 6):
        first.log_metrics({"train/loss": 4.5}, step)
    first.save()
    whole = first.path.read_bytes()
    lines = whole.splitlines(keepends=True)
    first.path.write_bytes(b"".join([*lines[:3], junk, b"\n", *lines[3:], junk]))
    again = MetricsCSV(first.path)
    assert again.rewind(5) == {"train/loss": 4.5}
    assert "metrics.csv: 1 line is damaged and left out." in capsys.readouterr().out
    assert first.path.read_bytes() == whole


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_lost_figures_are_said_once(kept: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = MetricsCSV(tmp_path / "metrics.csv")
    first.rewind(0)
    for step in range(2, 9, 2):
        first.log_metrics({"train/loss": 4.5}, step)
    first.save()
    again = MetricsCSV(first.path)
    again.rewind(9, log_every_steps=2)
    assert not capsys.readouterr().out
    first.path.write_bytes(b"".join(first.path.read_bytes().splitlines(keepends=True)[:kept]))
    last = 2 * max(0, kept - 1)
    again.rewind(9, log_every_steps=2)
    assert f"the metrics of steps {last + 1} to 9 are lost." in capsys.readouterr().out
    again.log_metrics({"train/loss": 4.5}, 10)
    again.save()
    MetricsCSV(first.path).rewind(10, log_every_steps=2)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("header", [b"st\xff,train/loss", b"1,4.5", b"step,step"])
def test_figures_without_their_names_are_refused(header: bytes, tmp_path: Path) -> None:
    (path := tmp_path / "metrics.csv").write_bytes(header + b"\n1,4.5\n")
    with pytest.raises(UserError, match=r"metrics\.csv: line 1 is damaged.*\n.*move it away"):
        MetricsCSV(path).rewind(1)


@pytest.mark.timeout(20)
def test_no_pipe_of_figures_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.csv")
    with pytest.raises(UserError, match=r"metrics\.csv: is a FIFO"):
        MetricsCSV(tmp_path / "metrics.csv").rewind(1)
    with pytest.raises(UserError, match=r"metrics\.csv: is a FIFO"):
        keep_lines_until(tmp_path / "metrics.csv", 1)


def test_damaged_lines_of_records_are_left_out_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\n[]\n{"step": "2"}\n{\n{"step": 2}\n{"step": 3}\n{"ste')
    keep_lines_until(path, 2)
    assert "samples.jsonl: 4 lines are damaged and left out." in capsys.readouterr().out
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_figures_of_the_last_step_outlive_a_kill_right_after_the_start(tmp_path: Path) -> None:
    """They were taken out of the file, to be written again with those of the validation."""
    first = MetricsCSV(tmp_path / "metrics.csv", sources=["wíki"])  # bytes and letters are not the same
    first.rewind(0)
    for step in range(1, 4):
        first.log_metrics({"train/loss": 4.5}, step)
    first.save()
    again = MetricsCSV(first.path, sources=["wíki"])
    assert again.rewind(2) == {"train/loss": 4.5}
    rewound = first.path.read_text(encoding="utf-8")
    assert rewound.count("\n") == 3 and "\n2,4.5," in rewound
    again.log_metrics({"val/bpb": 1.5}, 2)
    again.save()
    whole = first.path.read_text(encoding="utf-8")
    assert whole.count("\n") == 3 and "\n2,4.5," in whole and ",1.5," in whole


def test_figures_of_what_is_measured_no_longer_stay(tmp_path: Path) -> None:
    first = MetricsCSV(tmp_path / "metrics.csv", further=["core/copa", "core/mean"])
    first.rewind(0)
    for step in (1, 2, 3):
        first.log_metrics({"train/loss": 1.5, **({"core/copa": 0.25} if step < 3 else {"core/mean": 0.5})}, step=step)
    first.save()
    again = MetricsCSV(first.path, further=["chat/mean"])
    again.rewind(2)
    again.log_metrics({"chat/mean": 0.75}, step=2)
    again.log_metrics({"train/loss": 1.0}, step=3)
    again.save()
    with first.path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = ("step", "core/copa", "chat/mean")
    assert [[row[name] for name in names] for row in rows] == [["1", "0.25", ""], ["2", "0.25", "0.75"], ["3", "", ""]]
    assert "core/mean" not in rows[0], "of a step that is made again"


def test_figures_are_written_by_time_and_at_once_where_they_are_rare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not opened and closed at each step; a kill costs rows that no resume file counts on."""
    now = [0.0]
    monkeypatch.setattr(metrics_csv, "time", SimpleNamespace(monotonic=lambda: now[0]))
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.rewind(0)

    def steps_written() -> list[str]:
        return [line.split(",")[0] for line in log.path.read_text(encoding="utf-8").splitlines()[1:]]

    def train(*steps: int) -> list[str]:
        for step in steps:
            log.log_metrics({"train/loss": 4.5, "lr-of-a-callback": 0.1}, step)
        return steps_written()

    assert train(1, 2) == ["1"], "the first, to look at"
    assert train(3, 4) == ["1"]
    now[0] += metrics_csv.SECONDS_BETWEEN_FLUSHES
    assert train(5) == ["1", "2", "3", "4"]
    assert train(6, 7) == ["1", "2", "3", "4"]
    log.save()  # of a resume file of step 7
    counted_on = log.path.read_text(encoding="utf-8")
    assert steps_written() == [*"1234567"]
    log.log_metrics({"val/bpb": 1.5}, 7)
    assert steps_written() == [*"1234567"] and ",1.5," in log.path.read_text(encoding="utf-8")
    train(8, 9)
    log.finalize("success")
    assert steps_written() == [*"123456789"]
    again = MetricsCSV(log.path)
    assert again.rewind(7) == {"train/loss": 4.5, "val/bpb": 1.5}
    lines = log.path.read_text(encoding="utf-8").splitlines()
    assert lines[:-1] == counted_on.splitlines()[:-1] and lines[-1].startswith("7,4.5,") and ",1.5," in lines[-1]


def test_what_others_log_makes_no_rows(tmp_path: Path) -> None:
    """DeviceStatsMonitor counts steps from 0, and logs behind the step's row."""
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.rewind(0)
    for step in (1, 2, 3):
        log.log_metrics({"DeviceStatsMonitor.on_train_batch_start/cpu_percent": 7.0}, step - 1)
        log.log_metrics({"train/loss": 4.0 + step}, step)
        log.log_metrics({"DeviceStatsMonitor.on_train_batch_end/cpu_percent": 7.0}, step - 1)
        log.log_metrics({"train/loss": 9.0})
    log.finalize("success")
    with log.path.open(encoding="utf-8", newline="") as file:
        assert [(row["step"], row["train/loss"]) for row in csv.DictReader(file)] == [
            ("1", "5.0"),
            ("2", "6.0"),
            ("3", "7.0"),
        ]
    assert MetricsCSV(log.path).rewind(3) == {"train/loss": 7.0}


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


def test_a_file_that_has_no_room_is_not_begun(
    place: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_unfinished(place, "no-room")
    newest, older = resume_files(folder / "base" / "checkpoints")
    newest.unlink()
    monkeypatch.setattr("nanochat_pl.training.checkpoint.io.free_bytes", lambda path: 2**19)
    assert train("run=no-room") == 2
    error = capsys.readouterr().err
    assert "step=000040.ckpt: takes 0." in error and "0.5 MiB free" in error and "paths.runs" in error
    assert resume_files(older.parent) == [older] and damage(older) is None
    monkeypatch.undo()
    assert train("run=no-room") == 0
    assert same_weights(weights_of(place / "runs" / "whole", "base"), weights_of(folder, "base"))


def test_a_disk_that_fills_up_costs_no_file(
    full_disk: Path,
    train: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The space is looked at before a file is written; here it is gone all the same."""
    for module in ("stage_data.memory_check", "checkpoint.io"):
        monkeypatch.setattr(f"nanochat_pl.training.{module}.free_bytes", lambda path: 2**40)
    assert train("run=full") == 2
    error = capsys.readouterr().err
    assert "step=0000" in error and "MiB free" in error and "paths.runs" in error
    checkpoints = full_disk / "checkpoints"
    assert all(damage(path) is None for path in resume_files(checkpoints))
    assert not [path for path in checkpoints.iterdir() if ".tmp." in path.name]


def test_a_disk_that_may_only_be_read_is_named(
    place: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = start_run(place, "read-only", "base") / "base"
    with small_disk(folder, "20m"):
        whole = copy_unfinished(place, "read-only-source") / "base"
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        files = {path.name: path.read_bytes() for path in resume_files(folder / "checkpoints")}
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        assert train("run=read-only") == 2
        error = capsys.readouterr().err
        assert str(folder) in error and "Read-only file system" in error and "paths.runs" in error
        assert {path.name: path.read_bytes() for path in resume_files(folder / "checkpoints")} == files
    shutil.rmtree(folder.parent)


def test_the_best_are_kept_besides_the_newest(place: Path, train: Callable[..., int]) -> None:
    folder = start_run(place, "best", "base")
    settings = ["run=best", "trainer.keep_best=2", "evaluation.every_steps=4", "trainer.checkpoint_every_steps=15"]
    assert train(*settings) == 0
    checkpoints = folder / "base" / "checkpoints"
    bpb = {int(row[0]): float(row[-1]) for row in metrics_of(folder, "base") if row[-1] and 0 < int(row[0]) < 40}
    assert sorted(bpb) == list(range(4, 40, 4))
    ranked = sorted(bpb, key=lambda step: bpb[step])
    best = json.loads((checkpoints / BEST).read_text(encoding="utf-8"))
    assert [*best] == [f"step={step:06d}.ckpt" for step in ranked[:2]]
    assert list(best.values()) == pytest.approx([bpb[step] for step in ranked[:2]])
    assert {step_of(path) for path in resume_files(checkpoints)} == {*ranked[:2], 36, 40}


class _Trainer:
    """What the ranking needs of Lightning's: the step, and the metric of its validation."""

    def __init__(self, step: int, bpb: float) -> None:
        self.global_step, self.callback_metrics = step, {"val/bpb": torch.tensor(bpb)}


def test_the_ranking_outlives_the_process(tmp_path: Path) -> None:
    """Files are written before they are measured; those that are worse go, those that are damaged do not count."""

    def begin(keep_best: int = 2) -> ResumeFiles:
        files = ResumeFiles(tmp_path, 1, 1, StepClock(), keep_best=keep_best, measured_every=1)
        files.on_fit_start(None, None)
        return files

    def measured(files: ResumeFiles, step: int, bpb: float) -> list[int]:
        (tmp_path / f"step={step:06d}.ckpt").touch()
        files.on_validation_end(_Trainer(step, bpb), None)
        return [step_of(path) for path in resume_files(tmp_path)]

    files = begin()
    assert measured(files, 1, 2.0) == [1]
    assert measured(files, 2, 3.0) == [2, 1]
    files = begin()
    assert measured(files, 3, 1.0) == [3, 1]
    assert measured(files, 4, float("nan")) == [4, 3, 1]
    files = begin()
    assert measured(files, 5, 9.0) == [5, 3, 1]
    (tmp_path / "step=000003.ckpt").unlink()
    files = begin()
    assert measured(files, 6, 4.0) == [6, 1]
    assert json.loads((tmp_path / BEST).read_text(encoding="utf-8")) == {
        "step=000001.ckpt": 2.0,
        "step=000006.ckpt": 4.0,
    }
    begin(keep_best=0)
    assert not (tmp_path / BEST).exists()


def test_the_best_need_something_to_be_ranked_by(train: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run=unranked", "trainer.keep_best=1", "evaluation.every_steps=0") == 2
    assert "trainer.keep_best=1" in capsys.readouterr().err


def test_processes_learn_that_the_main_one_could_not_write(tmp_path: Path) -> None:
    for errors in run(2, _save_without_room, str(tmp_path)):
        assert len(errors) == 2 and all("step=000003.ckpt: takes" in error for error in errors)
    assert not list(tmp_path.iterdir())


def test_a_process_on_another_disk_says_so(tmp_path: Path, place: Path) -> None:
    (newest, *_) = resume_files(place / "runs" / "whole" / "base" / "checkpoints")
    (tmp_path / "main").mkdir()
    shutil.copy(newest, tmp_path / "main")
    for told in run(3, _look_into_another_folder, str(tmp_path)):
        assert "process 1: " in told and "paths.runs" in told


class _TwoProcessTrainer(_Trainer):
    """What saving needs of Lightning's: the main process writes, and then all wait for each other."""

    def __init__(self, step: int, io: BackgroundCheckpointIO) -> None:
        super().__init__(step, 0.0)
        self.loggers: list[object] = []
        self.checkpoint_io = io

    def save_checkpoint(self, path: Path, weights_only: bool, storage_options: str) -> None:
        if collectives.is_rank_zero():
            self.checkpoint_io.save_checkpoint({"weights": torch.ones(10)}, path, storage_options)
        collectives.barrier()


def _save_without_room(folder: str) -> list[str]:
    """Two attempts in a row: all processes hear of both, and are still in step."""
    checkpoint_io.free_bytes = lambda path: 0
    files = ResumeFiles(Path(folder), 1, 1, StepClock())
    errors = []
    for _ in range(2):
        try:
            files.save(_TwoProcessTrainer(3, files.io), wait=True)
        except UserError as error:
            errors.append(str(error))
    checkpoint_io.free_bytes = free_bytes
    return errors


def _look_into_another_folder(folder: str) -> str:
    """Only the main process sees the file: the others look elsewhere, as on another node."""
    try:
        newest_resume_file(Path(folder) / ("main" if collectives.is_rank_zero() else "other"))
    except UserError as error:
        return str(error)
    return ""
