"""Ends all processes of a training when one has failed, with the error of that one on top.

What is left waits for the failed one in a collective, for ever if nobody says a word. So each process has a thread that
speaks to the others past the collectives: through the store by which the launcher brought them together. It beats its
heart there, looks at the hearts of the others, and at a place where a process that fails writes why. It also hears
signals, which the main thread does not while it waits in a collective.

Nothing is saved here: the same command goes on from the last regular resume file.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

from nanochat_pl.common.constants import SAME_SIGNAL_SECONDS, SHOW_CURSOR
from nanochat_pl.common.errors import SharedError, UserError, visible
from nanochat_pl.common.place import Place, launched_place

Report = Callable[[BaseException], int]

# What collectives and stores say when another process has gone.
_OF_COLLECTIVES = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket")


@dataclass(frozen=True)
class Pace:
    """How fast a failure is noticed, in seconds.

    Attributes:
        interval: between two beats, and two looks.
        silence: a heart that did not beat for so long has stopped. A thread cannot beat while a library holds the
            interpreter's lock, so this is generous.
        suspicion: the same, once a collective has failed, or a signal has come: launchers send one to the others when a
            process has died.
        grace: what a process has to end by itself, once another has failed.
    """

    interval: float = 2.0
    silence: float = 40.0
    suspicion: float = 10.0
    grace: float = 4.0


@contextlib.contextmanager
def watchdog(report: Report | None = None, pace: Pace | None = None) -> Iterator[None]:
    """As long as the block lasts, no process outlives the failure of another. Of one process, nothing.

    An error that leaves the block ends this process at once: what is to be tidied up belongs inside. A
    :class:`SharedError` passes, since all processes have raised it.

    Args:
        report: prints an error to stderr and gives the exit code. None: its text, and 1.
        pace: how fast.
    """
    place = launched_place()
    if place.world_size == 1:
        yield
        return
    watch = _Watchdog(place, pace or Pace(), report or _report)
    try:
        yield
    except SharedError:
        watch.leave()
        raise
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code:
            watch.fail(error)
        watch.leave()
        raise
    watch.leave()


class _Watchdog:
    def __init__(self, place: Place, pace: Pace, report: Report) -> None:
        self.place, self.pace, self.report = place, pace, report
        # One for each thread: a request of one does not wait for that of the other.
        self._store, self._main_store = _connect(pace), _connect(pace)
        self._others = [rank for rank in range(place.world_size) if rank != place.rank]
        self._last_beats = dict.fromkeys(self._others, b"")
        self._looks_without_beat = dict.fromkeys(self._others, 0)
        self._leaving = threading.Event()
        self._collective_failed = False
        self._signals: list[int] = []
        self._last_signal = -math.inf
        self._wake, self._woken_by = socket.socketpair()
        self._woken_by.setblocking(False)
        signal.set_wakeup_fd(self._woken_by.fileno(), warn_on_full_buffer=False)
        # A process is not to end silently between the error of a collective and what is said of it.
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _left_to_the_thread)
        self._beat(self._store, "0")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    # What the main thread does.

    def leave(self) -> None:
        """The end without an error: the others need not listen for this heart any more."""
        self._dismiss_thread()
        self._thread.join()
        with contextlib.suppress(RuntimeError):  # the store is gone, with all who could have listened
            self._beat(self._main_store, "left")
        self._wake.close()
        self._woken_by.close()

    def _dismiss_thread(self) -> None:
        self._leaving.set()
        signal.set_wakeup_fd(-1)
        self._woken_by.send(b"\0")
        if signal.getsignal(signal.SIGTERM) is _left_to_the_thread:  # after a stop it is ignored, and stays so
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def fail(self, error: BaseException) -> None:
        """Say what went wrong here, then to the others that it did, and end."""
        if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OF_COLLECTIVES):
            self._collective_failed = True  # another process is gone: the thread finds which, and ends this one
            self._thread.join(self.pace.suspicion + self.pace.grace + 3 * self.pace.interval)
        self._dismiss_thread()
        printed, line = io.StringIO(), _first_line(error)
        with contextlib.redirect_stderr(printed):
            code = self.report(error)
        store, said = self._main_store, False
        with contextlib.suppress(RuntimeError):
            if store.compare_set("first", "", str(self.place.rank)) != str(self.place.rank).encode():
                store.wait(["failure"], timedelta(seconds=self.pace.grace))
                said = store.get("failure").decode("utf-8").partition("\n")[2] == line
        if not said:  # where all processes find the same error, one prints it
            _print(self.place.rank, printed.getvalue())
        with contextlib.suppress(RuntimeError):
            store.compare_set("failure", "", f"{self.place.rank}\n{line}")
            self._beat(store, "left")
            self._keep_store_for_the_others()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)

    def _keep_store_for_the_others(self) -> None:
        """Without an agent that hosts the store, it ends with the process of rank 0: not before all have read it."""
        if self.place.rank > 0 or _launcher_hosts_store():
            return
        patience = threading.Event()
        for _ in range(int((self.pace.grace + self.pace.interval) * 20)):
            if all(beat == b"left" for beat in self._beats(self._main_store).values()):
                return
            patience.wait(0.1)

    # What the thread does.

    def _watch(self) -> None:
        beat = 0
        while not self._leaves_within(self.pace.interval):
            beat += 1
            try:
                self._beat(self._store, str(beat))
                if self._store.check(["failure"]):
                    self._end_after_failure()
                elif (silent := self._silent()) is not None:
                    self._store.compare_set("failure", "", f"{silent}\nit is gone: killed, or its machine has failed")
                elif self._signals:
                    self._end_where_main_does_not()
            except RuntimeError:
                self._end_without_store()

    def _leaves_within(self, seconds: float) -> bool:
        """Whether the main thread is done with the block; a signal ends the waiting, too."""
        if select.select([self._wake], [], [], seconds)[0]:
            came = next((signum for signum in self._wake.recv(64) if signum), None)
            if came and time.monotonic() - self._last_signal > SAME_SIGNAL_SECONDS:
                self._signals.append(came)
                self._last_signal = time.monotonic()
        return self._leaving.is_set()

    def _end_where_main_does_not(self) -> None:
        """Signals came. The first one in a training is the training's; any other is to end the process now, which the
        main thread cannot do while it waits for a process that does not come."""
        handler = signal.getsignal(self._signals[-1])
        ours = handler in (_left_to_the_thread, signal.default_int_handler)
        if (ours or len(self._signals) > 1) and not self._collective_failed:
            signum = self._signals[-1]
            if not self._leaving.wait(self.pace.grace) and not self._collective_failed:
                os._exit(128 + signum)

    def _silent(self) -> int | None:
        """A process whose heart has stopped. Looks are counted and not seconds: where all were suspended, nobody
        looked."""
        for rank, beat in self._beats(self._store).items():
            news = beat != self._last_beats[rank] or beat == b"left"
            self._last_beats[rank] = beat
            self._looks_without_beat[rank] = 0 if news else self._looks_without_beat[rank] + 1
        limit = self.pace.suspicion if self._collective_failed or self._signals else self.pace.silence
        silent = [rank for rank, looks in self._looks_without_beat.items() if looks * self.pace.interval > limit]
        return silent[0] if silent else None

    def _end_after_failure(self) -> None:
        rank, _, line = self._store.get("failure").decode("utf-8").partition("\n")
        if self._leaving.wait(0 if self._collective_failed else self.pace.grace):
            return
        self._end(f"ended because process {rank} failed: {line}")

    def _end_without_store(self) -> None:
        """Nobody would hear of a failure any more. A stop that is under way may still come to its end, with a file
        that takes long: the connections of the collectives are others."""
        looks = 0
        while looks * self.pace.interval < self._patience_without_store():
            if self._leaves_within(self.pace.interval):
                return
            looks += 1
        host = "the launcher" if _launcher_hosts_store() else "process 0"
        self._end(f"ended because {host} is gone: killed, or its machine has failed")

    def _patience_without_store(self) -> float:
        if self._collective_failed:
            return self.pace.suspicion
        return 10 * self.pace.silence if self._signals else self.pace.silence

    def _end(self, why: str) -> None:
        _print(self.place.rank, f"{visible(why)}\n")
        with contextlib.suppress(RuntimeError):
            self._beat(self._store, "left")
        os._exit(1)

    # What both do.

    def _beat(self, store: Any, beat: str) -> None:
        store.set(f"heart/{self.place.rank}", beat)

    def _beats(self, store: Any) -> dict[int, bytes]:
        there = [rank for rank in self._others if store.check([f"heart/{rank}"])]
        beats = dict(zip(there, store.multi_get([f"heart/{rank}" for rank in there]), strict=True)) if there else {}
        return {rank: beats.get(rank, b"") for rank in self._others}


def _connect(pace: Pace) -> Any:
    """A client of the store that the launcher, or else the process of rank 0, hosts for all."""
    from torch.distributed import PrefixStore, TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(
        host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=max(pace.silence / 2, 5))
    )
    # A launcher that starts the workers again keeps its store, and with it the failure of those before.
    return PrefixStore(f"nanochat_pl/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _launcher_hosts_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _left_to_the_thread(signum: int, frame: FrameType | None) -> None:
    """That there is a handler at all makes Python wake the thread."""


def _report(error: BaseException) -> int:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return 1


def _first_line(error: BaseException) -> str:
    if isinstance(error, UserError):
        return error.problems[0]
    return visible(f"{type(error).__name__}: {error}".partition("\n")[0])


def _print(rank: int, text: str) -> None:
    """Say which process it is, in one write: lines of several processes do not mix."""
    lines = [f"process {rank}: {line}" if line.strip() else line for line in text.splitlines(keepends=True)]
    cursor = SHOW_CURSOR if os.isatty(2) else b""  # which a progress bar has hidden
    os.write(2, cursor + "".join(lines).encode("utf-8", errors="replace"))
