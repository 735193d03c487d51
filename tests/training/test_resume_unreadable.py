"""Resume files that are damaged or cannot be read: the two are told apart, and no run begins anew without a word."""

from __future__ import annotations

import errno
import os
import random
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.training.callbacks.metrics import StepClock
from nanochat_pl.training.checkpoint import io as checkpoint_io
from nanochat_pl.training.checkpoint import resume
from nanochat_pl.training.checkpoint.io import AtomicCheckpointIO
from nanochat_pl.training.checkpoint.resume import ResumeFiles, damage, newest_resume_file, resume_files, step_of
from tests.training.conftest import copy_unfinished, metrics_of, same_weights, weights_of

Train = Callable[..., int]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "lock"}


def test_a_file_that_cannot_be_read_is_no_damaged_one(
    place: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    """All files were put aside when a disk in the network was gone for a moment, and the run began at step 0."""
    folder = copy_unfinished(place, "unreadable") / "base"
    newest = resume_files(folder / "checkpoints")[0]
    newest.rename(folder / "away")
    newest.symlink_to(newest)  # a loop: the system refuses to open it, to anybody
    before, names = contents(folder), {path.name for path in (folder / "checkpoints").iterdir()}
    assert train("run=unreadable") == 2
    error = capsys.readouterr().err
    assert f"{newest}: cannot be read: {os.strerror(errno.ELOOP)}." in error and "from an older one" in error
    assert contents(folder) == before and {path.name for path in (folder / "checkpoints").iterdir()} == names
    newest.unlink()
    (folder / "away").rename(newest)
    assert train("run=unreadable") == 0
    assert same_weights(weights_of(place / "runs" / "whole", "base"), weights_of(folder.parent, "base"))
    assert metrics_of(place / "runs" / "whole", "base") == metrics_of(folder.parent, "base")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOMEM])
def test_what_the_system_refuses_is_no_damage(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the bytes are verified, and while the tensors are mapped, of which torch tells in words of its own."""
    path = saved(tmp_path / "step=000001.ckpt")

    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    def refuse_in_words(*arguments: object, **keywords: object) -> None:
        raise RuntimeError(f"unable to mmap 4 bytes from file <x>: {os.strerror(code)} ({code})")

    with monkeypatch.context() as broken, pytest.raises(UserError, match=os.strerror(code)):
        broken.setattr(zipfile.ZipFile, "testzip", refuse)
        newest_resume_file(tmp_path)
    with monkeypatch.context() as broken, pytest.raises(UserError, match=os.strerror(code)):
        broken.setattr(torch, "load", refuse_in_words)
        newest_resume_file(tmp_path)
    assert newest_resume_file(tmp_path) == path


def test_a_folder_that_cannot_be_read_is_not_empty(
    place: Path, train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_unfinished(place, "unreadable-folder") / "base"
    before = contents(folder)
    listed = Path.iterdir

    def refuse(path: Path) -> object:
        if path.name == "checkpoints":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return listed(path)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "iterdir", refuse)
        assert train("run=unreadable-folder") == 2
        with pytest.raises(UserError, match="checkpoints: cannot be read: "):
            newest_resume_file(folder / "checkpoints")
    assert "checkpoints: cannot be read: " in capsys.readouterr().err
    assert contents(folder) == before


def test_without_a_readable_file_a_run_does_not_begin_again(
    place: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor under other settings, which nothing was left to be compared with."""
    folder = copy_unfinished(place, "none-readable") / "base"
    newest, older = resume_files(folder / "checkpoints")
    whole = older.read_bytes()
    newest.write_bytes(b"")
    assert newest_resume_file(older.parent) == older
    assert "is damaged" in capsys.readouterr().out
    older.write_bytes(b"")
    before = contents(folder)
    for left in (older, None):
        if left is None:
            older.unlink()
        assert train("run=none-readable") == 2
        error = capsys.readouterr().err
        assert f"{newest}.damaged is damaged" in error and (f"{older} is damaged" in error) == (left is not None)
        assert "resume=never" in error and str(folder) in error and "going on" not in error
        assert train("run=none-readable", "optim.matrix_lr=0.03") == 2
        assert "begun with optim.matrix_lr=0.02" in capsys.readouterr().err
        assert contents(folder) == before
    older.write_bytes(whole)
    assert train("run=none-readable") == 0
    assert same_weights(weights_of(place / "runs" / "whole", "base"), weights_of(folder.parent, "base"))


def saved(path: Path, step: int = 1) -> Path:
    """A small file with all that a resume file must have."""
    weights = {"a.weight": torch.arange(6.0), "b.weight": torch.ones(2, 2, dtype=torch.bfloat16)}
    content = {"global_step": step, "state_dict": weights, "optimizer_states": [{"state": {0: torch.zeros(3)}}]}
    torch.save(content, path)
    return path


@pytest.mark.slow
def test_each_flipped_bit_is_found_or_does_no_harm(tmp_path: Path) -> None:
    """Wrong bytes became all kinds of errors, and then the run ended with a traceback."""
    path = saved(tmp_path / "step=000001.ckpt")
    good, chance, found = path.read_bytes(), random.Random(0), 0
    expected = AtomicCheckpointIO().load_checkpoint(path)["state_dict"]
    # Most bytes are padding and the archive's table: that has each kind of error.
    for place in chance.sample(range(len(good) * 8), 1500):
        data = bytearray(good)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problem = damage(path)
            if problem is None:
                assert same_weights(AtomicCheckpointIO().load_checkpoint(path)["state_dict"], expected)
        found += problem is not None
    assert found > 300


def test_damaged_files_go_when_there_are_enough_newer_ones(tmp_path: Path) -> None:
    """They are as large as the others, and stayed for ever."""
    for name in ("step=000004.ckpt.damaged", "step=000009.ckpt.damaged"):
        (tmp_path / name).touch()
    (tmp_path / "step=000005.ckpt.damaged").mkdir()

    def left(*steps: int) -> set[str]:
        for step in steps:
            (tmp_path / f"step={step:06d}.ckpt").touch()
        ResumeFiles(tmp_path, 1, 2, StepClock()).on_fit_start(None, None)
        return {path.name for path in tmp_path.iterdir() if path.suffix == ".damaged" and path.is_file()}

    both = {"step=000004.ckpt.damaged", "step=000009.ckpt.damaged"}
    assert left(2, 3) == both
    assert left(4) == both
    assert left(5) == {"step=000009.ckpt.damaged"}
    assert left(9) == {"step=000009.ckpt.damaged"}
    assert left(10) == set()
    assert [step_of(path) for path in resume_files(tmp_path)] == [10, 9]


def test_a_start_verifies_the_newest_file_once(place: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_unfinished(place, "once") / "base"
    newest = resume_files(folder / "checkpoints")[0]
    looked: list[Path] = []
    monkeypatch.setattr(resume, "damage", lambda path: looked.append(path) or damage(path))
    assert train("run=once") == 0
    assert looked == [newest]


def test_a_file_that_is_gone_already_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        saved(tmp_path / f"step={step:06d}.ckpt", step)
    there = resume_files(tmp_path)
    (tmp_path / "step=000001.ckpt").unlink()
    monkeypatch.setattr(resume, "resume_files", lambda folder: there)
    ResumeFiles(tmp_path, 1, 1, StepClock()).on_fit_start(None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["step=000002.ckpt"]


def test_what_is_read_back_was_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    synced, wrong_bytes = os.fsync, checkpoint_io.wrong_bytes
    monkeypatch.setattr(os, "fsync", lambda file: done.append("sync") or synced(file))
    monkeypatch.setattr(checkpoint_io, "wrong_bytes", lambda path: done.append("read back") or wrong_bytes(path))
    path = tmp_path / "step=000001.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"weights": torch.ones(3)}, path)
    assert io.failure is None and path.exists()
    assert done[:2] == ["sync", "read back"]
    shutil.copy(path, older := tmp_path / "older")
    monkeypatch.setattr(checkpoint_io, "wrong_bytes", lambda path: "x is damaged")
    io.save_checkpoint({"weights": torch.zeros(3)}, path)
    assert f"{path}: what was written cannot be read back: x is damaged." in str(io.failure)
    assert path.read_bytes() == older.read_bytes() and len([*tmp_path.iterdir()]) == 2
