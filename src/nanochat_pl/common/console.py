"""What a person sees in the terminal: lines, tables, progress of long work, and what to do next.

On a terminal there are colours and moving bars; in a pipe or a log file plain lines, one now and then. Of the processes
of a training the main one speaks; the others are silent.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from nanochat_pl.common.errors import visible
from nanochat_pl.common.launch_env import launch_env

# A log file has no width: wide enough that no table is cut.
WIDTH_WITHOUT_TERMINAL = 160
SECONDS_BETWEEN_LINES = 15.0
_MB = 10**6

Advance = Callable[[int], None]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich would exit with 1 here: whether a reader who has left ends the program is not for it to say


def console(stderr: bool = False) -> Console:
    """A rich console on today's stdout or stderr (asked for anew each time, so that redirection works)."""
    made = _Console(stderr=stderr, highlight=False, soft_wrap=True, quiet=launch_env().rank > 0)
    if not made.is_terminal:
        made.width = WIDTH_WITHOUT_TERMINAL
    return made


def replace_unencodable_characters(*streams: TextIO) -> None:
    """Signs that a stream's encoding does not have become question marks instead of errors."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class _IgnoringBrokenPipe:
    """A stream whose end is no error: from then on what is written goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._carefully(lambda: self.stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._carefully(lambda: self.stream.flush())

    def _carefully(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BlockingIOError:
            pass  # a slow reader of a stream that does not wait: it misses something
        except (OSError, ValueError):  # ValueError: it was closed here
            self._end()

    def _end(self) -> None:
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 (may have to stay open)
        try:
            # In its place, for all who write to it: what Python has not written yet goes there, too.
            os.dup2(nowhere.fileno(), self.stream.fileno())
            nowhere.close()
        except (OSError, ValueError):  # it has no number, or none any more
            self.stream = nowhere


@contextlib.contextmanager
def ignore_broken_pipe() -> Iterator[None]:
    """Work that goes on where nobody can read any more what it prints: the terminal is closed, `tee` has died."""
    before = sys.stdout, sys.stderr
    streams = [stream and _IgnoringBrokenPipe(stream) for stream in before]  # None: it was closed when Python began
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for stream in filter(None, streams):
            stream.flush()
        sys.stdout, sys.stderr = (stream and stream.stream for stream in streams)


def rank_zero_print(text: str = "", style: str = "") -> None:
    """Print a line as it is: brackets are not markup, long lines are not broken, nothing steers the terminal."""
    console().print(Text(visible(text), style=style))


def print_from_any_rank(text: str) -> None:
    """As :func:`rank_zero_print`, but for what matters whichever process it comes from: its rank is said."""
    made = console()
    made.quiet = False
    made.print(Text(visible(f"process {rank}: {text}" if (rank := launch_env().rank) else text)))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """Print a table. Columns that hold only numbers in every row are set right.

    Args:
        columns: headings.
        rows: cells; numbers are printed as ``str`` gives them, ``None`` as an empty cell.
        title: a line above.
    """
    body = [["" if cell is None else str(cell) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for n, heading in enumerate(columns):
        numeric = bool(body) and all(_is_number(row[n]) for row in body)
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in body:
        table.add_row(*(Text(visible(cell)) for cell in row))
    if title:
        rank_zero_print(title, style="bold")
    console().print(table, soft_wrap=False)


def next_steps(commands: Sequence[tuple[str, str]]) -> None:
    """Print what a person can do now: (what it is for, the command), one a line."""
    width = max(len(purpose) for purpose, _ in commands)
    rank_zero_print("Next:", style="bold")
    for purpose, command in commands:
        rank_zero_print(f"  {purpose:<{width}}  {command}")


def by_difference(advance: Advance) -> Callable[[int, int], None]:
    """For work that reports (done, in all): calls ``advance`` with what was done since the last report."""
    before = 0

    def report(done: int, total: int) -> None:
        nonlocal before
        advance(done - before)
        before = done

    return report


@contextlib.contextmanager
def progress(what: str, total: int, unit: str = "") -> Iterator[Advance]:
    """Show the progress of long work; yields a function that is called with the number of units just done.

    A bar on a terminal; else a line every :data:`SECONDS_BETWEEN_LINES`, and none at all for work that is short.
    """
    if console(stderr=True).is_terminal and launch_env().rank == 0:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda amount: bar.advance(task, amount)
        return
    yield _lines_now_and_then(what, total, unit)


@contextlib.contextmanager
def counted_bytes(what: str, num_bytes: int) -> Iterator[Advance]:
    """As :func:`progress`, in megabytes: several threads advance it, by bytes."""
    lock, done = threading.Lock(), 0
    with progress(what, num_bytes // _MB, "MB") as advance:

        def count(amount: int) -> None:
            nonlocal done
            with lock:
                advance((done + amount) // _MB - done // _MB)
                done += amount

        yield count


def _lines_now_and_then(what: str, total: int, unit: str) -> Advance:
    done, spoken = 0, time.monotonic()

    def advance(amount: int) -> None:
        nonlocal done, spoken
        done += amount
        if time.monotonic() - spoken >= SECONDS_BETWEEN_LINES:
            spoken = time.monotonic()
            rank_zero_print(f"{what}: {done:,} of {total:,} {unit}".rstrip())

    return advance


def _is_number(cell: str) -> bool:
    stripped = cell.strip().rstrip("%").replace(",", "").replace("±", "").replace(" ", "")
    return not stripped or stripped.replace(".", "").replace("-", "").replace("e", "").replace("+", "").isdigit()
