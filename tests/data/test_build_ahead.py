"""Rows that are packed while they are read: the same for any course of events, and errors that arrive."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.cache.background_build import BuilderProcess, Job, build
from nanochat_pl.data.packing import streamed_index
from nanochat_pl.data.packing.packer import Packing, pack_as_they_come
from nanochat_pl.data.packing.rows import Rows, streamed_rows
from nanochat_pl.data.packing.streamed_index import StreamedIndex
from nanochat_pl.data.sources.base import Shard
from tests.helpers.fake_data import ByteTokenizer, ListSource, cache_files

T = 64
SETTINGS = {"sequence_len": T, "mode": "split", "buffer_documents": 20, "refill_documents": 4, "seed": 3}


def texts(seed: int, count: int) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choices("abcdefgh ", k=chance.randint(0, 200))) for _ in range(count)]


SHARDS = {f"{number}": texts(number, 40 + 10 * number) for number in range(4)}


def start_in_process(job: Job, cache_dir: Path) -> BuilderProcess:
    """All is built before anybody reads: what the builder does, without a process."""
    builder = BuilderProcess(cache_dir / "status.json")
    builder.tell(0)
    try:
        build(dataclasses.replace(job, num_threads=2), builder.tell)
        builder.tell(builder_told(builder), finished=True)
    except UserError as error:
        builder.tell(builder_told(builder), error.problems, error.fix)
    return builder


def builder_told(builder: BuilderProcess) -> int:
    return int(json.loads(builder.status.read_text())["segments"])


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat_pl.data.packing.rows.start_builder", start_in_process)


def open_rows(cache_dir: Path, num_rows: int = 500, shards: dict[str, list[str]] = SHARDS, **changes: object) -> Rows:
    listed = ListSource(shards).shards("train")
    settings = SETTINGS | {"shuffle": "shards"} | changes
    return streamed_rows(listed, ByteTokenizer(), cache_dir, num_rows=num_rows, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["split", "crop"])
@pytest.mark.parametrize("shuffle", ["shards", "none"])
def test_segments_are_the_rows_of_one_long_list(tmp_path: Path, in_process: None, mode: str, shuffle: str) -> None:
    """Also after the first epoch: what is packed shard by shard is what is packed of all documents in a row."""
    rows = open_rows(tmp_path, 600, mode=mode, shuffle=shuffle)
    assert rows.index.stats.epochs >= 2
    ends = rows.index._ends.tolist()  # type: ignore[union-attr]
    assert [rows.epochs_after(number) for number in (0, ends[0], ends[3])] == [0.0, 0.25, 1.0]
    assert 1.0 < rows.epochs_after(ends[3] + 1) < rows.epochs_after(ends[4] - 1) < 1.25
    inputs, targets = rows.read(range(600))
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])
    packing = Packing(T + 1, mode, 20, 4, shuffle, 3)  # type: ignore[arg-type]
    lengths = [np.array([len(text) for text in shard]) for shard in SHARDS.values()]
    first = np.cumsum([0, *map(len, lengths)])
    whole = []
    for segment in pack_as_they_come(lengths.__getitem__, lambda shard: int(first[shard]), 4, packing):
        whole += [
            segment.pieces[a:b].tolist() for a, b in zip(segment.row_starts, segment.row_starts[1:], strict=False)
        ]
        if len(whole) >= 600:
            break
    for number in range(600):
        address = [[*SHARDS].index(piece.shard) for piece in rows.address(number)]
        found = [
            [int(first[shard]) + piece.document, piece.start, piece.stop - piece.start]
            for shard, piece in zip(address, rows.address(number), strict=True)
        ]
        assert found == whole[number]


def test_an_address_leads_to_the_text(tmp_path: Path, in_process: None) -> None:
    rows = open_rows(tmp_path, 600)
    for number in (0, 57, 599):
        ids = [
            id
            for piece in rows.address(number)
            for id in [
                0,
                *(byte + 1 for byte in SHARDS[piece.shard][piece.document].encode()[piece.start : piece.stop]),
            ]
        ]
        assert rows.read([number])[0][0].tolist() == ids[:T]


def test_the_first_epoch_takes_the_shards_as_they_come_and_later_ones_do_not(tmp_path: Path, in_process: None) -> None:
    rows = open_rows(tmp_path, 600)
    order = [piece.shard for number in range(600) for piece in rows.address(number)]
    firsts = [order.index(shard) for shard in SHARDS]
    assert firsts == sorted(firsts), "the first epoch takes them as they are given"
    packing = Packing(T + 1, "split", 20, 4, "shards", 3)
    asked: list[int] = []
    packed = pack_as_they_come(
        lambda shard: asked.append(shard) or np.full(30, 50), lambda shard: 30 * shard, 6, packing
    )
    for _ in range(24):
        next(packed)
    epochs = [asked[start : start + 6] for start in range(0, 24, 6)]
    assert epochs[0] == list(range(6)) and len({tuple(epoch) for epoch in epochs}) == 4
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    in_source_order = open_rows(tmp_path, 600, shuffle="none")
    documents = [piece.document for number in range(20) for piece in in_source_order.address(number)]
    assert max(documents) < 60, "of the beginning of the first shard"
    assert not np.array_equal(rows.read(range(50))[0], in_source_order.read(range(50))[0])
    assert not np.array_equal(rows.read(range(50))[0], open_rows(tmp_path, 600, seed=4).read(range(50))[0])


def rows_hash(rows: Rows) -> str:
    return hashlib.sha256(np.stack(rows.read(range(len(rows)))).tobytes()).hexdigest()


def index_files(cache_dir: Path) -> dict[str, bytes]:
    """What is vouched for in a cache, by its place."""
    found = [path for path in cache_dir.rglob("*") if path.suffix in (".bin", ".npy") or path.name == "manifest.json"]
    return {path.relative_to(cache_dir).as_posix(): path.read_bytes() for path in found}


def test_fewer_rows_and_a_second_time_give_the_same(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = open_rows(tmp_path, 37).read(range(37))
    many = open_rows(tmp_path, 500).read(range(37))
    assert np.array_equal(few, many)
    monkeypatch.setattr("nanochat_pl.data.packing.rows.start_builder", None)
    assert np.array_equal(open_rows(tmp_path, 500).read(range(37)), many)


@pytest.mark.parametrize("damaged", ["tokens.bin", "pieces.npy"])
def test_damage_is_found_when_the_rows_are_opened(tmp_path: Path, in_process: None, damaged: str) -> None:
    whole = rows_hash(open_rows(tmp_path))
    files = index_files(tmp_path)
    path = max(cache_files(tmp_path, damaged), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert rows_hash(open_rows(tmp_path)) == whole
    assert index_files(tmp_path) == files


@pytest.mark.parametrize("seed", range(6))
def test_a_builder_that_is_killed_at_any_point_is_taken_over(tmp_path: Path, in_process: None, seed: int) -> None:
    """Its files are those of a builder that nobody killed."""
    whole = rows_hash(open_rows(tmp_path / "whole"))
    listed = ListSource(SHARDS).shards("train")
    job = job_of(listed, tmp_path / "killed")
    process = multiprocessing.get_context("fork").Process(target=build, args=(job, lambda segments: None))
    process.start()
    time.sleep(random.Random(seed).uniform(0, 0.12))
    process.kill()
    process.join()
    assert rows_hash(open_rows(tmp_path / "killed")) == whole
    assert index_files(tmp_path / "killed") == index_files(tmp_path / "whole")


def job_of(shards: list[Shard], cache_dir: Path, num_rows: int = 500) -> Job:
    """What :func:`streamed_rows` would give to a builder."""
    jobs: list[Job] = []

    def keep(job: Job, cache_dir: Path) -> BuilderProcess:
        jobs.append(job)
        return BuilderProcess(cache_dir)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat_pl.data.packing.rows.start_builder", keep)
        streamed_rows(shards, ByteTokenizer(), cache_dir, num_rows=num_rows, shuffle="shards", **SETTINGS)  # type: ignore[arg-type]
    return jobs[0]


def test_two_builders_at_once_tokenize_each_shard_once(tmp_path: Path, in_process: None) -> None:
    whole = rows_hash(open_rows(tmp_path / "one"))
    job = job_of(ListSource(SHARDS).shards("train"), tmp_path / "two")
    log = tmp_path / "log"
    slow = [
        dataclasses.replace(each, shard=dataclasses.replace(each.shard, read=Slow(each.shard, log)))
        for each in job.shards
    ]
    job = dataclasses.replace(job, shards=tuple(slow))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build, args=(job, lambda segments: None)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(log.read_text().split()) == sorted(SHARDS)
    assert rows_hash(open_rows(tmp_path / "two")) == whole
    assert index_files(tmp_path / "two") == index_files(tmp_path / "one")


class Slow:
    """The documents of a shard, slowly; writes down that they were asked for."""

    def __init__(self, shard: Shard, log: Path) -> None:
        self.shard, self.log = shard, log

    def __call__(self) -> Iterator[str]:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{self.shard.name}\n")
        time.sleep(0.1)
        return self.shard.read()


def test_an_error_of_the_builder_is_raised_once_its_rows_are_asked_for(tmp_path: Path, in_process: None) -> None:
    def broken() -> Iterator[str]:
        yield "fine"
        raise UserError("shard 2: is no whole parquet file.", fix="Download it again.")

    shards = ListSource(SHARDS).shards("train")
    shards[2] = dataclasses.replace(shards[2], read=broken)
    settings = SETTINGS | {"shuffle": "shards"}
    rows = streamed_rows(shards, ByteTokenizer(), tmp_path, num_rows=500, **settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"shard 2: is no whole.*\n?.*Download it again") as error:
        rows.read([499])
    assert len(error.value.problems) == 1


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Builders are processes, and what is patched here is patched there."""
    fork, before = multiprocessing.get_context("fork"), multiprocessing.active_children()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    yield
    for process in set(multiprocessing.active_children()) - set(before):
        process.kill()
        process.join()


def test_what_a_builder_said_is_kept_as_long_as_its_parent_lives(tmp_path: Path, forked: None) -> None:
    """It was cleared away after a day, by any other run that began, and a run of two days ended with an error."""
    rows = open_rows(tmp_path, 500)
    rows.wait_for(500)
    [lock] = (tmp_path / "ahead").glob("*.lock")
    dead = BuilderProcess(tmp_path / "ahead" / "dead.json")
    dead.tell(0)
    dead.lock.touch()
    for path in (lock, dead.lock):
        os.utime(path, (1e9, 1e9))
    open_rows(tmp_path, 600)
    assert isinstance(rows.index, StreamedIndex) and isinstance(rows.index._builder, BuilderProcess)
    assert rows.index._builder.segments_ready(0) > 0
    assert not dead.status.exists() and not dead.lock.exists()


def test_a_builder_that_cannot_even_write_its_error_is_an_error_without_a_traceback(
    tmp_path: Path, forked: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = BuilderProcess.tell

    def tell(builder: BuilderProcess, segments: int, *more: object, **others: object) -> None:
        if segments or more or others:
            raise UserError(f"{builder.status}: cannot be written: the disk is full (0 MiB free)")
        real(builder, segments)

    monkeypatch.setattr(BuilderProcess, "tell", tell)
    rows = open_rows(tmp_path, 500)
    with pytest.raises(UserError, match=r"could not be written \([\d,]+ MiB free\)(.|\n)*paths\.cache"):
        rows.wait_for(500)
    assert "Traceback" not in capfd.readouterr().err


def test_shards_without_a_token_are_an_error_and_no_endless_loop(tmp_path: Path, in_process: None) -> None:
    rows = open_rows(tmp_path, 5, {"a": ["", ""], "b": []})
    with pytest.raises(UserError, match="nothing to pack"):
        rows.read([0])


def test_the_last_row_is_found_without_reading_the_others(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeking costs one segment and the shards of one row, however many there are; few files are open."""
    shards = {f"{number:03}": texts(number, 8) for number in range(40)}
    rows = open_rows(tmp_path, 600, shards)
    opened: list[int] = []
    real = streamed_index.read_index
    monkeypatch.setattr(streamed_index, "read_index", lambda *place: opened.append(1) or real(*place))
    rows = pickle.loads(pickle.dumps(open_rows(tmp_path, 600, shards)))
    opened.clear()
    rows.read([599])
    assert len(opened) == 1
    assert sum(shard._open is not None for shard in rows.cache.shards) <= len(rows.address(599))
    monkeypatch.setattr("nanochat_pl.data.cache.tokens._MAX_OPEN_SHARDS", 3)
    again = pickle.loads(pickle.dumps(rows))
    assert rows_hash(again) == rows_hash(rows)
    assert sum(shard._open is not None for shard in again.cache.shards) <= 3
