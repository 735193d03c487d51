"""Loading large libraries."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Import libraries without looking for garbage meanwhile: of their many objects hardly one is."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def loading_libraries() -> Iterator[None]:
    """Import what takes seconds: without garbage collection, and with a Ctrl-C kept until it is done.

    A command does so when it has said what is wrong with its settings.
    """
    with _interrupts_wait(), no_garbage_collection():
        yield


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Keep a Ctrl-C until the libraries are loaded: in the middle of that it gets lost, or leaves half a library."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
