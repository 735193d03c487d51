"""Lines, tables and progress as they look where there is no terminal."""

from __future__ import annotations

import pytest

from nanochat_pl.common import console


def test_lines_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = "brackets [red] stay, and a long line is not broken: " + "word " * 60
    console.say(text)
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
