"""Lines, tables and progress as they look where there is no terminal."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_pl.common import console


def test_lines_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = "brackets [red] stay, and a long line is not broken: " + "word " * 60
    console.rank_zero_print(text)
    assert capsys.readouterr().out == f"{text}\n"


def test_tables_set_numbers_right_and_keep_all_cells(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(("task", "right"), [("spelling [x]", 5), ("a", 200), ("none", None)], title="tasks")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["tasks", "task          right", "spelling [x]      5", "a               200", "none"]


def test_a_table_without_rows_has_its_headings(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(("a", "b"), [])
    assert capsys.readouterr().out.split() == ["a", "b"]


def test_next_steps_are_in_one_column(capsys: pytest.CaptureFixture[str]) -> None:
    console.next_steps([("talk", "chat run=x"), ("read it", "open y")])
    assert capsys.readouterr().out == "Next:\n  talk     chat run=x\n  read it  open y\n"


def test_progress_without_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.progress("reading", 10, "files") as advance:
        advance(3)
    assert capsys.readouterr().out == "", "short work says nothing"
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    with console.progress("reading", 10, "files") as advance:
        advance(3)
        advance(4)
    assert capsys.readouterr().out == "reading: 3 of 10 files\nreading: 7 of 10 files\n"


# Says three lines and shows a bar after its reader has gone; a file tells how far it came.
WITHOUT_READER = """
import sys, warnings
from nanochat_pl.common.console import console, ignore_broken_pipe, progress, rank_zero_print, print_from_any_rank, print_table

with ignore_broken_pipe():
    rank_zero_print("first")
    sys.stdin.readline()
    with progress("work", 2) as advance:
        advance(1)
        rank_zero_print("x" * 20_000)
        print_from_any_rank("second")
        print_table(("a",), [(1,)])
        print("to stderr", file=sys.stderr)
        warnings.warn("third")
        advance(1)
    print("not flushed")
open(sys.argv[1], "w").write("done")
print("after it"), print("after it", file=sys.stderr)
"""


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_work_goes_on_where_its_reader_is_gone(kind: str, tmp_path: Path) -> None:
    ours, theirs = os.pipe() if kind == "pipe" else os.openpty()
    command = [sys.executable, "-c", WITHOUT_READER, str(tmp_path / "done")]
    # With a session of its own: no SIGHUP comes with the terminal's end.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, start_new_session=True)
    try:
        os.close(theirs)
        assert os.read(ours, 5) == b"first"
        os.close(ours)
        process.communicate(b"\n", timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0 and (tmp_path / "done").read_text() == "done"


def test_streams_are_as_before_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with console.ignore_broken_pipe(), console.ignore_broken_pipe():
        console.rank_zero_print("said")
        assert not console.console().is_terminal and sys.stdout.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before and capsys.readouterr().out == "said\n"


def test_a_stream_that_was_closed_or_never_there_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(sys, "stderr", None)
    with console.ignore_broken_pipe():
        console.rank_zero_print("x")
        print("x")
    print("x"), print("x", file=sys.stderr)
    with pytest.raises(KeyError), console.ignore_broken_pipe():
        raise KeyError  # only what is printed is forgiven


def test_a_listing_whose_reader_has_enough_ends_quietly() -> None:
    """As in `nanochat-pl runs | head`."""
    lines = "from nanochat_pl.common.console import rank_zero_print; [rank_zero_print(str(n)) for n in range(100_000)]; return 0"
    program = f"import sys; from nanochat_pl.cli import main\ndef listing(arguments): {lines}\nmain._dispatch = listing"
    command = [sys.executable, "-c", f"{program}\nsys.exit(main.main([]))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline() == b"0\n"
            process.stdout.close()
            assert process.stderr.read() == b"" and process.wait(120) == 128 + 13
        finally:
            process.kill()
