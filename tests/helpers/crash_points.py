"""Every point at which a training may be killed: each change of a file in its folder, and each phase of a step.

``python -m tests.helpers.crash_points WATCH ARGUMENTS…`` is ``nanochat-pl ARGUMENTS…``, watched: :func:`install` (WATCH
is its arguments as JSON) names the points as the process comes to them, and kills it at one of them with SIGKILL: no
``finally``, nothing flushed. Resume files are written in a thread beside the steps, so their points stand in no fixed
order; of one name, there are equally many each time.
"""

from __future__ import annotations

import builtins
import functools
import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule

from nanochat_pl.cli.main import main
from nanochat_pl.optim.muon_adamw import MuonAdamW
from nanochat_pl.training.callbacks import metrics_csv
from nanochat_pl.training.checkpoint import io as checkpoint_io
from nanochat_pl.training.module import LMModule

HOOKS = (
    "on_fit_start",
    "on_train_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_end",
    "on_train_end",
)
# What Python reports just before it does it, besides opening for writing.
FILE_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_folder = Path()
_names: list[str] = []
_names_to: Path | None = None
_crash_at: tuple[str, int] | None = None
_lock = threading.RLock()
SECONDS_AHEAD = 0.3  # that the writer of a resume file is held up before the kill, for the training to go on
STEP = "before MuonAdamW.step"


def install(folder: str, crash_at: tuple[str, int] | None = None, names_to: str | None = None) -> None:
    """Watch this process.

    Args:
        folder: changes of files below count.
        crash_at: name of the point at which it is killed, and how often the process has been there; None: it is not.
        names_to: where :func:`write_names` writes the names of all points.
    """
    global _folder, _crash_at, _names_to
    _folder, _names_to = Path(folder).resolve(), Path(names_to) if names_to else None
    _crash_at = None if crash_at is None else (crash_at[0], crash_at[1])
    metrics_csv.SECONDS_BETWEEN_FLUSHES = math.inf  # else there are as many as the machine is slow
    _watch_files()
    _watch_steps()


def write_names() -> None:
    """Write what points there were, in their order, as JSON."""
    if _names_to is not None:
        _names_to.write_text(json.dumps(_names), encoding="utf-8")


def one_of_each_kind(names: Sequence[str]) -> dict[str, int]:
    """The number of the middle point of each kind: of each operation on files, and of each phase of a step."""
    kinds: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        what, _, of = name.partition(" ")
        kinds.setdefault(name if what in ("before", "after") and ".on_" not in of else what, []).append(number)
    return {kind: numbers[len(numbers) // 2] for kind, numbers in sorted(kinds.items())}


def _point(name: str, torn: Callable[[], None] = lambda: None) -> None:
    """A point; ``torn`` leaves behind what is torn by a kill here."""
    with _lock:
        is_reached = _crash_at == (name, _names.count(name))
    if is_reached:
        if threading.current_thread() is not threading.main_thread():
            _let_the_training_go_on()
        torn()
        os.kill(os.getpid(), signal.SIGKILL)
    with _lock:
        _names.append(name)


def _let_the_training_go_on() -> None:
    """Until it is at work on another step, where it does not wait itself."""
    deadline, steps = time.monotonic() + SECONDS_AHEAD, _names.count(STEP)
    while time.monotonic() < deadline and _names.count(STEP) == steps:
        time.sleep(0.001)


def _inside(path: Any, folder: int = -1) -> str | None:
    """The name of a path in the watched folder, without random parts; None where it is outside."""
    if isinstance(path, int) or folder not in (-1, None):
        base = Path(f"/proc/self/fd/{path if isinstance(path, int) else folder}").resolve()
        path = base if isinstance(path, int) else base / os.fsdecode(path)
    absolute = Path(os.path.abspath(os.fsdecode(path)))  # noqa: PTH100 (links are not followed)
    if not absolute.is_relative_to(_folder):
        return None
    return re.sub(r"[0-9a-f]{16}", "…", str(absolute.relative_to(_folder)))


def _watch_files() -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & _WRITE and not isinstance(arguments[0], int):
            if (name := _inside(arguments[0])) is not None:
                _point(f"open {name}")
        elif event in FILE_EVENTS:
            folder = arguments[-1] if isinstance(arguments[-1], int) else -1
            if (name := _inside(arguments[0], folder)) is not None:
                _point(f"{event.removeprefix('os.')} {name}")

    sys.addaudithook(hook)
    os.fsync = _fsync  # type: ignore[assignment]
    builtins.open = io.open = _open_watched
    torch.save = _torn(torch.save)


def _fsync(descriptor: int) -> None:
    """A point, and nothing else: what is written outlives a process anyway, and waiting for disks takes long."""
    if (name := _inside(descriptor)) is not None:
        _point(f"fsync {name}")


def _torn(save: Any) -> Any:
    """A function of a library that writes a whole file: killed in it, half of the file is there."""

    @functools.wraps(save)
    def watched(value: Any, path: Any, *arguments: Any, **named: Any) -> None:
        save(value, path, *arguments, **named)
        if (name := _inside(path)) is not None:
            _point(f"half {name}", lambda: os.truncate(path, os.stat(path).st_size // 2))  # noqa: PTH116

    return watched


class _Watched(io.FileIO):
    """A file that is written in two halves."""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        name = _inside(self.fileno())
        written = 0
        for what, part in (("write", view[: len(view) // 2]), ("half", view[len(view) // 2 :])):
            _point(f"{what} {name}")
            while part:
                count = super().write(part)
                assert count
                written, part = written + count, part[count:]
        return written

    def truncate(self, size: int | None = None) -> int:
        _point(f"truncate {_inside(self.fileno())}")
        return super().truncate(size)


_open = io.open


def _open_watched(
    file: Any,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    *more: Any,
    **named: Any,
) -> Any:
    """``open``, where a file in the folder is written."""
    if isinstance(file, int) or mode in ("r", "rb") or _inside(file) is None:
        return _open(file, mode, buffering, encoding, errors, newline, *more, **named)
    raw = _Watched(file, mode.replace("b", "").replace("t", ""))
    buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)


def _watch_steps() -> None:
    _around(LMModule, "between_micro_batches")
    _around(LightningModule, "manual_backward")
    _around(MuonAdamW, "step")
    for phase in ("copy_to_host", "_write", "_verify"):
        _around(checkpoint_io, phase)
    for callback in _our_callbacks(Callback):
        for hook in HOOKS:
            if hook in vars(callback):
                _around(callback, hook)


def _our_callbacks(base: type[Any]) -> Iterator[type[Any]]:
    for callback in base.__subclasses__():
        if callback.__module__.startswith("nanochat_pl."):
            yield callback
        yield from _our_callbacks(callback)


def _around(owner: Any, name: str) -> None:
    """A point before a method and one after it."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def watched(*arguments: Any, **named: Any) -> Any:
        of = owner.__name__.rpartition(".")[2]
        _point(f"before {of}.{name}")
        result = method(*arguments, **named)
        _point(f"after {of}.{name}")
        return result

    setattr(owner, name, watched)


if __name__ == "__main__":
    install(**json.loads(sys.argv[1]))
    code = main(sys.argv[2:])
    write_names()
    sys.exit(code)
