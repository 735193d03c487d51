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

from nanochat_pl.common.constants import SAME_SIGNAL_SECONDS, SHOW_CURSOR, STOP_SIGNALS
from nanochat_pl.common.errors import SharedError, UserError, visible
from nanochat_pl.common.launch_env import LaunchEnv, launch_env, launcher_hosts_store, master_address

Report = Callable[[BaseException], int]

_SECONDS_TO_PRINT = 5.0  # where the reader of a full pipe waits

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
    place = launch_env()
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
    """Two threads: one speaks to the others, one waits for nobody and sees whether the first is answered."""

    def __init__(self, place: LaunchEnv, pace: Pace, report: Report) -> None:
        self.place, self.pace, self.report = place, pace, report
        # One for each thread: a request of one does not wait for that of the other.
        self._store, self._main_store = _connect(pace), _connect(pace)
        self._others = [rank for rank in range(place.world_size) if rank != place.rank]
        self._last_beats = dict.fromkeys(self._others, b"")
        # Looks are counted and not seconds: where all were suspended, nobody looked.
        self._looks_without_beat = dict.fromkeys(self._others, 0)
        self._looks_without_answer = 0
        self._leaving, self._has_left = threading.Event(), threading.Event()
        self._collective_failed = False
        self._failure: tuple[int, str] | None = None  # of this process: exit code, and what is to be printed yet
        self._signals: list[int] = []
        self._last_signal = -math.inf
        self._wake, self._woken_by = socket.socketpair()
        self._woken_by.setblocking(False)
        signal.set_wakeup_fd(self._woken_by.fileno(), warn_on_full_buffer=False)
        # A process is not to end silently between the error of a collective and what is said of it.
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _left_to_the_thread)
        self._beat(self._store, "0")
        self._speaks = self._begun(self._watch_others, "watchdog")
        self._hears = self._begun(self._watch_here, "watchdog of signals")

    def _begun(self, watch: Callable[[], None], name: str) -> threading.Thread:
        def guarded() -> None:
            try:
                watch()
            except BaseException as error:
                self._end(f"ended because its watchdog has failed: {type(error).__name__}: {error}")

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    # What the main thread does.

    def leave(self) -> None:
        """The end without an error: the others need not listen for this heart any more."""
        self._leaving.set()
        self._speaks.join(self.pace.grace)  # no longer: what it asks may never be answered
        self._has_left.set()
        signal.set_wakeup_fd(-1)
        self._woken_by.send(b"\0")
        self._hears.join()
        self._wake.close()
        self._woken_by.close()
        if signal.getsignal(signal.SIGTERM) is _left_to_the_thread:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def fail(self, error: BaseException) -> None:
        """Say what went wrong here, then to the others that it did, and end."""
        if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OF_COLLECTIVES):
            self._collective_failed = True  # another process is gone: the threads find which, and end this one
            time.sleep(self.pace.suspicion + self.pace.grace + 3 * self.pace.interval)
        printed, line, code = io.StringIO(), _first_line(error), 1
        self._failure = code, f"{line}\n"
        self._leaving.set()
        try:
            with contextlib.redirect_stderr(printed):
                code = self.report(error)
            self._failure = code, printed.getvalue()
            if not self._others_said(line):
                _print(self.place.rank, printed.getvalue())
            self._failure = code, ""
        finally:
            with contextlib.suppress(RuntimeError):
                self._main_store.compare_set("failure", "", f"{self.place.rank}\n{line}")
                self._beat(self._main_store, "left")
                self._keep_store_for_the_others()
            with contextlib.suppress(OSError, ValueError, AttributeError):  # it is closed
                sys.stdout.flush()
            os._exit(code)

    def _others_said(self, line: str) -> bool:
        """Whether another process has said the same: where all find one error, one prints it."""
        own = str(self.place.rank)
        with contextlib.suppress(RuntimeError):
            if self._main_store.compare_set("first", "", own) != own.encode():
                self._main_store.wait(["failure"], timedelta(seconds=self.pace.grace))
                return bool(self._main_store.get("failure").decode("utf-8").partition("\n")[2] == line)
        return False

    def _keep_store_for_the_others(self) -> None:
        """Without an agent that hosts the store, it ends with the process of rank 0: not before all have read it."""
        if self.place.rank > 0 or launcher_hosts_store():
            return
        for _ in range(int((self.pace.grace + self.pace.interval) * 20)):
            if all(beat == b"left" for beat in self._beats(self._main_store).values()):
                return
            time.sleep(0.1)

    # What the thread that speaks to the others does.

    def _watch_others(self) -> None:
        beat = 0
        with contextlib.suppress(RuntimeError):  # the store is gone: the other thread sees that nothing is answered
            while not self._leaving.wait(self.pace.interval):
                beat += 1
                self._beat(self._store, str(beat))
                if self._store.check(["failure"]):
                    self._end_after_failure()
                elif (silent := self._silent()) is not None:
                    self._store.compare_set("failure", "", f"{silent}\nit is gone: killed, or its machine has failed")
            if self._failure is None:
                self._beat(self._store, "left")

    def _silent(self) -> int | None:
        """A process whose heart has stopped."""
        for rank, beat in self._beats(self._store).items():
            news = beat != self._last_beats[rank] or beat == b"left"
            self._last_beats[rank] = beat
            self._looks_without_beat[rank] = 0 if news else self._looks_without_beat[rank] + 1
        # As a signal can mean that another process has died, so can it be the first of a long end.
        suspects = self._collective_failed or time.monotonic() - self._last_signal < self.pace.silence
        limit = self.pace.suspicion if suspects else self.pace.silence
        silent = [rank for rank, looks in self._looks_without_beat.items() if looks * self.pace.interval > limit]
        return silent[0] if silent else None

    def _end_after_failure(self) -> None:
        rank, _, line = self._store.get("failure").decode("utf-8").partition("\n")
        if self._leaving.wait(0 if self._collective_failed else self.pace.grace):
            return
        self._end(f"ended because process {rank} failed: {line}", self._store)

    # What the thread that waits for nobody does.

    def _watch_here(self) -> None:
        while not self._has_left_within(self.pace.interval):
            self._looks_without_answer += 1
            if self._signals:
                self._end_where_main_does_not()
            if self._looks_without_answer * self.pace.interval > self._patience_without_answer():
                host = f"the launcher on {master_address()[0]}" if launcher_hosts_store() else "process 0"
                self._end(f"ended because {host} does not answer any more: it was ended, or its machine has failed")

    def _has_left_within(self, seconds: float) -> bool:
        """Whether the main thread is done with the block; notes the signals that come."""
        until = time.monotonic() + seconds
        while not self._has_left.is_set() and (left := until - time.monotonic()) > 0:
            if select.select([self._wake], [], [], left)[0]:
                # Also those of children that end, which others want to hear.
                came = next((number for number in self._wake.recv(4096) if number in STOP_SIGNALS), None)
                if came and time.monotonic() - self._last_signal > SAME_SIGNAL_SECONDS:
                    self._signals.append(came)
                    self._last_signal = time.monotonic()
        return self._has_left.is_set()

    def _end_where_main_does_not(self) -> None:
        """Signals came. The first one in a training is the training's; any other is to end the process now, which the
        main thread cannot do while it waits for a process that does not come."""
        handler = signal.getsignal(self._signals[-1])
        ours = handler in (_left_to_the_thread, signal.default_int_handler)
        if (ours or len(self._signals) > 1) and not self._collective_failed:
            signum = self._signals[-1]
            if not self._leaving.wait(self.pace.grace) and not self._collective_failed:
                os._exit(128 + signum)

    def _patience_without_answer(self) -> float:
        """Nobody would hear of a failure any more. A stop that is under way may still come to its end, with a file
        that takes long: the connections of the collectives are others."""
        if self._collective_failed:
            return self.pace.suspicion
        return 10 * self.pace.silence if self._signals and not self._leaving.is_set() else self.pace.silence

    # What all do.

    def _end(self, why: str, store: Any = None) -> None:
        code, text = self._failure or (1, f"{visible(why)}\n")
        try:
            _print(self.place.rank, text)
            if store is not None:
                with contextlib.suppress(RuntimeError):
                    self._beat(store, "left")
        finally:
            os._exit(code)

    def _beat(self, store: Any, beat: str) -> None:
        store.set(f"heart/{self.place.rank}", beat)
        self._looks_without_answer = 0

    def _beats(self, store: Any) -> dict[int, bytes]:
        hearts = {rank: f"heart/{rank}" for rank in self._others}
        if not store.check(list(hearts.values())):  # some have only begun
            hearts = {rank: heart for rank, heart in hearts.items() if store.check([heart])}
        beats = dict(zip(hearts, store.multi_get(list(hearts.values())) if hearts else [], strict=True))
        self._looks_without_answer = 0
        return {rank: beats.get(rank, b"") for rank in self._others}


def _connect(pace: Pace) -> Any:
    """A client of the store that the launcher, or else the process of rank 0, hosts for all."""
    from torch.distributed import PrefixStore, TCPStore

    host, port = master_address()
    store = TCPStore(
        host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=max(pace.silence / 2, 5))
    )
    # A launcher that starts the workers again keeps its store, and with it the failure of those before.
    return PrefixStore(f"nanochat_pl/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


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
    """Say which process it is, in one write: lines of several processes do not mix. To nobody, where nobody reads."""
    lines = [f"process {rank}: {line}" if line.strip() else line for line in text.splitlines(keepends=True)]
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], _SECONDS_TO_PRINT)[1]:
            cursor = SHOW_CURSOR if os.isatty(2) else b""  # which a progress bar has hidden
            os.write(2, cursor + "".join(lines).encode("utf-8", errors="replace"))
