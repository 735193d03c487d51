"""Fetching, tokenizing and packing ahead of the training, in a process of its own that ends with its starter.

It speaks through files alone, so any number of processes (loaders, other ranks) may read and wait: the cache that it
fills, a small status file, and beside that a lock, which the operating system frees however the process ends. When its
work is done it stays and keeps the lock: as long as somebody may ask for the status, nobody clears it away.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import FREE_SPACE, ensure_folder, free_bytes, read_json, write_json
from nanochat_pl.common.launch_env import launch_on_node
from nanochat_pl.common.locks import try_lock
from nanochat_pl.data.cache.content_cache import fingerprint_of
from nanochat_pl.data.cache.tokens import ShardToBuild, TokenCache, tokenized
from nanochat_pl.data.hub.errors import library_heard
from nanochat_pl.data.packing.packer import Packing, pack_as_they_come
from nanochat_pl.data.packing.streamed_index import Segments
from nanochat_pl.tokenizer import Tokenizer

_LOOK_AGAIN_SECONDS = 0.05
_FORGOTTEN_SECONDS = 24 * 3600.0  # younger ones may not have their lock yet


@dataclass(frozen=True)
class Job:
    """What is to be built: segments of the index, until they hold so many rows, and the shards that they need."""

    cache: TokenCache
    shards: tuple[ShardToBuild, ...]
    tokenizer: Tokenizer
    packing: Packing
    segments: Segments
    num_rows: int
    num_threads: int | None = None


def build(job: Job, report: Callable[[int], None]) -> None:
    """Build in this process. What is there already is packed again, which is fast, and not tokenized again.

    Args:
        report: called with the number of segments that are there.

    Raises:
        UserError: what the source says of a file, or the disk; or no document has a token.
    """
    num_there, num_rows = 0, 0
    with closing(tokenized(job.shards, job.tokenizer, job.num_threads)) as shards:

        def lengths_of(shard: int) -> np.ndarray:
            nonlocal num_there
            while num_there <= shard:
                next(shards)
                num_there += 1
            return job.cache.shards[shard].lengths()

        packed = pack_as_they_come(lengths_of, job.cache.first_document, len(job.shards), job.packing)
        for number, segment in enumerate(packed):
            job.segments.keep(number, segment)
            report(number + 1)
            num_rows += segment.num_rows
            if num_rows >= job.num_rows:
                return


@dataclass(frozen=True)
class BuilderProcess:
    """A process that builds, seen by those who wait for it: a
    :class:`~nanochat_pl.data.packing.streamed_index.Builder`."""

    status: Path

    @property
    def lock(self) -> Path:
        return self.status.with_suffix(".lock")

    def segments_ready(self, known: int) -> int:
        """How many segments there are, from the first.

        Raises:
            UserError: there are no more than those ``known``, and the process has failed or was ended.
        """
        alive = self.is_alive()  # asked first: then its last words have been written
        try:
            told = read_json(self.status)
        except UserError as error:  # where it cannot be written it is removed, which needs no space
            free = free_bytes(self.status) / 2**20
            raise UserError(
                f"{self.status}: what the process that tokenizes ahead says is gone: it was removed, or could not be "
                f"written ({free:,.0f} MiB free).",
                fix=f"{FREE_SPACE} The same command goes on.",
            ) from error
        if told["segments"] > known:
            return int(told["segments"])
        if told["problems"]:
            raise UserError(told["problems"], fix=told["fix"])
        if not alive and not told["finished"]:
            raise UserError(
                "the process that tokenizes ahead of the training was ended.",
                fix="The same command goes on from the last resume file. Was the memory full? See dmesg.",
            )
        return known

    def is_alive(self) -> bool:
        with self.lock.open("a", encoding="utf-8") as file:
            return not try_lock(file)

    def tell(self, segments: int, problems: tuple[str, ...] = (), fix: str = "", finished: bool = False) -> None:
        told = {"segments": segments, "problems": list(problems), "fix": fix, "finished": finished}
        write_json(self.status, told)


def start_builder(job: Job, cache_dir: Path) -> BuilderProcess:
    """Start a process that builds; it is at work when this returns. One for all processes of a training on this node:
    the first of them to call this starts it.

    Several may work at once, as those of a mixture do. Each encodes with as many threads as its job says, by default
    one for each core: they share the cores, and leave them to the training first.

    Raises:
        UserError: it could not be started, or its folder cannot be written or locked.
    """
    folder = ensure_folder(cache_dir / "ahead")
    _forget_old_ones(folder)
    launch = launch_on_node()
    name = f"{launch}-{fingerprint_of(job.segments.key, job.num_rows)[:16]}" if launch else uuid.uuid4().hex
    builder = BuilderProcess(folder / f"{name}.json")
    if builder.status.exists():
        return builder
    builder.tell(0)
    # Not forked: this process may have threads of torch, and a device.
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(job, builder), daemon=True)
    process.start()
    while not builder.is_alive():
        if process.exitcode is not None:
            raise UserError(f"the process that tokenizes ahead could not start (exit code {process.exitcode}).")
        time.sleep(_LOOK_AGAIN_SECONDS)
    return builder


def _run(job: Job, builder: BuilderProcess) -> None:
    # Signals are for the training, which ends this process in its time with a SIGTERM. Those that launchers send come
    # to a whole group of processes.
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(10)  # where both want the cores, the training has them
    with builder.lock.open("a", encoding="utf-8") as lock:
        while not try_lock(lock):  # whoever looks whether this process is alive has it for a moment
            time.sleep(_LOOK_AGAIN_SECONDS)
        try:
            with library_heard():
                _build_and_tell(job, builder)
        except UserError:  # the disk is full: nothing can be told, but something be taken away
            builder.status.unlink(missing_ok=True)
        _end_with_parent()


def _build_and_tell(job: Job, builder: BuilderProcess) -> None:
    done = 0

    def report(segments: int) -> None:
        nonlocal done
        done = segments
        builder.tell(segments)

    try:
        build(job, report)
    except UserError as error:
        builder.tell(done, error.problems, error.fix)
    else:
        builder.tell(done, finished=True)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _forget_old_ones(folder: Path) -> None:
    for path in folder.glob("*.lock"):
        with contextlib.suppress(FileNotFoundError), path.open("a", encoding="utf-8") as file:
            if time.time() - path.stat().st_mtime > _FORGOTTEN_SECONDS and try_lock(file):
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink()
