"""Rows reach the training: the same for any number of processes, of loader workers, and of stops."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.locks import try_lock
from nanochat_pl.data.cache.tokens import build_token_cache
from nanochat_pl.data.packing.rows import Rows, packed_rows, streamed_rows
from nanochat_pl.data.sources.base import DataSettings
from nanochat_pl.data.sources.open import open_source
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.training.checkpoint.resume import newest_resume_file
from nanochat_pl.training.datamodule import RowsDataModule, share
from tests.helpers.forked import Forked
from tests.helpers.small_disk import enlarge, small_disk
from tests.training.conftest import same_weights, start_run, weights_of
from tests.training.test_resume import command, interrupt

T = 128
STEPS = 50


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 17])
def test_every_row_is_in_one_share(count: int, world: int) -> None:
    shares = [share(100, count, rank, world) for rank in range(world)]
    assert list(itertools.chain(*shares)) == list(range(100, 100 + count))
    sizes = list(map(len, shares))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
    assert sizes[0] == -(-count // world), "the plan's rows_per_device"


def hashes(rows: Rows, first: int, end: int, num_workers: int = 0, world: int = 1) -> list[str]:
    """One hash for the rows of each step, put together of the shares of all processes."""
    rows_per_step = len(rows) // STEPS
    modules = [RowsDataModule(rows, rows_per_step, end, num_workers) for _ in range(world)]
    for rank, module in enumerate(modules):
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        place = {"global_rank": rank, "world_size": world}
        module.trainer = SimpleNamespace(global_step=first, strategy=strategy, callbacks=[], **place)  # type: ignore[assignment]
    found = []
    for parts in zip(*(module.train_dataloader() for module in modules), strict=True):
        assert sum(part.num_targets for part in parts) == rows_per_step * T
        arrays = [np.concatenate([part[side].numpy() for part in parts]) for side in (0, 1)]
        found.append(hashlib.sha256(np.stack(arrays).tobytes()).hexdigest())
    return found


@pytest.fixture(scope="module")
def tokenizer(place: Path) -> Tokenizer:
    return Tokenizer.load(place / "runs" / "whole" / "tokenizer" / "bundle" / "tokenizer.json")


def open_rows(path: Path, shuffle: str, rows_per_step: int, tokenizer: Tokenizer, cache_dir: Path) -> Rows:
    source = open_source(DataSettings(name="local", path=str(path)), cache_dir)
    settings = {"sequence_len": T, "mode": "split", "num_rows": STEPS * rows_per_step, "seed": 1}
    if shuffle != "global":
        return streamed_rows(source.shards("train"), tokenizer, cache_dir, shuffle=shuffle, **settings)
    cache = build_token_cache(source, "train", tokenizer, cache_dir)
    return packed_rows(cache, bos_id=tokenizer.bos_id, cache_dir=cache_dir, **settings)


@pytest.mark.parametrize(
    "folder, rows_per_step, shuffle",
    [
        ("text", 7, "shards"),
        pytest.param("text", 7, "global", marks=pytest.mark.slow),
        pytest.param("text_tiny", 450, "shards", marks=pytest.mark.slow),
        ("text_tiny", 450, "global"),
    ],
)
def test_rows_are_the_same_for_any_number_of_processes_and_workers(
    shared: Path, tmp_path: Path, tokenizer: Tokenizer, folder: str, rows_per_step: int, shuffle: str
) -> None:
    """50 steps, of text_tiny more than an epoch. A regression: loaders that differ, or lose their place."""
    path = shared / "data" / folder
    rows = open_rows(path, shuffle, rows_per_step, tokenizer, tmp_path)
    whole = hashes(rows, 0, STEPS)
    assert len(set(whole)) == STEPS
    assert folder == "text" or rows.index.stats.epochs == 2
    for world in (2, 3, 4):
        assert hashes(rows, 0, STEPS, world=world) == whole
    for num_workers in (1, 2):
        assert hashes(rows, 0, STEPS, num_workers, world=num_workers) == whole
    for stop, num_workers in ((23, 0), (41, 1)):
        again = open_rows(path, shuffle, rows_per_step, tokenizer, tmp_path)
        assert hashes(rows, 0, stop) + hashes(again, stop, STEPS, num_workers) == whole


@pytest.mark.slow
def test_a_builder_ends_with_its_parent_even_if_that_is_killed(
    shared: Path, place: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Killed half-built, the cache is gone on with, and the rows are those of a cache that nobody killed."""
    program = (
        "import sys, time; from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        "    from nanochat_pl.data.sources.open import open_source\n"
        "    from nanochat_pl.data.packing.rows import streamed_rows\n"
        "    from nanochat_pl.data.sources.base import DataSettings; from nanochat_pl.tokenizer import Tokenizer\n"
        "    path, tokenizer, cache = sys.argv[1], Tokenizer.load(Path(sys.argv[2])), Path(sys.argv[3])\n"
        "    shards = open_source(DataSettings(name='local', path=path), cache).shards('train')\n"
        "    settings = dict(sequence_len=128, mode='split', num_rows=22_500, seed=1)\n"
        "    streamed_rows(shards, tokenizer, cache, **settings)\n"
        "    print('started', flush=True); time.sleep(100)\n"
    )
    (tmp_path / "parent.py").write_text(program, encoding="utf-8")
    tokenizer_file = place / "runs" / "whole" / "tokenizer" / "bundle" / "tokenizer.json"
    cache = tmp_path / "cache"
    path = shared / "data" / "text_tiny"
    parent = Forked([str(each) for each in (tmp_path / "parent.py", path, tokenizer_file, cache)], capture=True)
    while "started" not in parent.printed()[0]:
        assert parent.poll() is None, parent.printed()
        time.sleep(0.01)
    [lock] = (cache / "ahead").glob("*.lock")
    parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while not free(lock):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.05)
    rows = open_rows(path, "shards", 450, tokenizer, cache)
    other = open_rows(path, "shards", 450, tokenizer, tmp_path / "other")
    assert hashes(rows, 0, STEPS) == hashes(other, 0, STEPS)


def free(lock: Path) -> bool:
    with lock.open("a", encoding="utf-8") as file:
        return try_lock(file)


@pytest.fixture
def streaming(place: Path, tmp_path: Path) -> list[str]:
    """Settings for texts of several shards that are tokenized while the training runs."""
    texts = tmp_path / "texts"
    texts.mkdir()
    documents = (place / "texts" / "texts.txt").read_text(encoding="utf-8").split("\n\n")
    for number in range(4):
        part = "\n\n".join(documents[number::4])
        (texts / f"{number}.txt").write_text(part, encoding="utf-8")
    (tmp_path / "val.txt").write_text("\n\n".join(documents[:40]), encoding="utf-8")
    # A full buffer is what the first row waits for.
    keys = {"path": texts, "validation_path": tmp_path / "val.txt", "shuffle": "shards", "pack_buffer_documents": 20}
    return [f"data.{key}={value}" for key, value in keys.items()]


@pytest.mark.slow
def test_a_training_on_shards_as_they_come_is_killed_and_goes_on(
    place: Path, train: Callable[..., int], streaming: list[str]
) -> None:
    start_run(place, "streamed", "base")
    assert train("run=streamed", *streaming) == 0
    folder = start_run(place, "streamed-killed", "base")
    checkpoints = folder / "base" / "checkpoints"
    shutil.rmtree(place / "cache" / "rows")
    arguments = [*command(place, "streamed-killed", "base"), *streaming]
    assert interrupt(arguments, lambda: any(checkpoints.glob("step=*.ckpt")), signal.SIGKILL) == -signal.SIGKILL
    assert train("run=streamed-killed", *streaming, "trainer.num_workers=1") == 0
    assert same_weights(weights_of(place / "runs" / "streamed", "base"), weights_of(folder, "base"))


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_error_of_the_builder_ends_the_training_with_one_message(
    place: Path,
    train: Callable[..., int],
    streaming: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    num_workers: int,
) -> None:
    """A bad line in a late file is met when the training has begun."""
    folder = start_run(place, f"broken-{num_workers}", "base")
    (tmp_path / "texts" / "3.jsonl").write_text('{"text": "fine"}\n{"text": \n', encoding="utf-8")
    # More rows than the files before have, in one epoch.
    keys = ["max_steps=400", f"trainer.num_workers={num_workers}", "trainer.checkpoint_every_steps=1000"]
    assert train(f"run={folder.name}", *streaming, *keys) == 2
    said = capsys.readouterr()
    assert said.err.count("3.jsonl:2: is not valid JSON") == 1 and "Traceback" not in said.err + said.out
    last = (folder / "base" / "metrics.csv").read_text(encoding="utf-8").splitlines()[-1]
    newest = newest_resume_file(folder / "base" / "checkpoints")
    assert newest is not None and newest.name == f"step={int(last.split(',')[0]):06d}.ckpt", "no step is lost"
    (tmp_path / "texts" / "3.jsonl").unlink()


@pytest.mark.parametrize("shuffle", ["global", "shards"])
def test_a_disk_that_fills_while_caching_is_one_error_and_leaves_nothing_half_written(
    shared: Path, tmp_path: Path, tokenizer: Tokenizer, shuffle: str
) -> None:
    path = shared / "data" / "text_tiny"
    with small_disk(tmp_path / "small", "3m") as disk:
        with pytest.raises(UserError, match="the disk is full") as error:
            open_rows(path, shuffle, 450, tokenizer, disk).read([0, 450 * STEPS - 1])
        assert len(error.value.problems) == 1 and "paths.cache" in error.value.fix
        assert not list(disk.rglob("*.tmp.*"))
        done = len(list(disk.glob("tokens/*/manifest.json")))
        assert 0 < done < 3
        enlarge(disk, "30m")
        rows = open_rows(path, shuffle, 450, tokenizer, disk)
        assert len(set(hashes(rows, 0, STEPS))) == STEPS
