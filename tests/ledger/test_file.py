"""The ledger's file: whole lines whoever writes at the same time, and however a writer ended."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from nanochat_pl.ledger import LEDGER, Entry, append, newest, read_ledger


def entry(run: str, exit: str = "finished", bits: float = 1.0) -> Entry:
    return Entry(run, "base", exit, "2026-11-29T00:00:00+00:00", metrics={"val/bpb": bits}, settings={"seed": 1})  # type: ignore[arg-type]


def _write_many(runs: Path, name: str) -> None:
    for number in range(200):
        append(runs, entry(f"{name}-{number}"))


def test_an_entry_is_read_as_it_was_written(tmp_path: Path) -> None:
    append(tmp_path, entry("a", bits=1.25))
    assert read_ledger(tmp_path) == [entry("a", bits=1.25)]
    assert read_ledger(tmp_path / "none") == []


def test_processes_that_write_at_once_lose_no_line(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(tmp_path, name)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    names = [each.run for each in read_ledger(tmp_path)]
    assert sorted(names) == sorted(f"{name}-{number}" for name in ("a", "b") for number in range(200))


def test_a_line_that_was_cut_off_costs_only_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(tmp_path, entry("a"))
    with (tmp_path / LEDGER).open("ab") as file:
        file.write(b'{"run": "cut')
    append(tmp_path, entry("b"))
    assert [each.run for each in read_ledger(tmp_path)] == ["a", "b"]
    assert "1 damaged line is left out" in capsys.readouterr().out


@pytest.mark.parametrize("line", [b"[]", b"null", b'{"run": 1}', b'{"run": "a", "stage": "base"}', b"{" * 3000])
def test_what_is_no_entry_is_left_out(line: bytes, tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_bytes(line + b"\n")
    assert read_ledger(tmp_path) == []


def test_keys_of_a_later_version_are_left_out(tmp_path: Path) -> None:
    assert Entry.from_plain({**entry("a").to_plain(), "later": 1}, "here") == entry("a")


def test_a_start_counts_as_long_as_nothing_follows_it(tmp_path: Path) -> None:
    lines = [("a", "started"), ("b", "started"), ("b", "started"), ("a", "finished"), ("c", "failed"), ("c", "started")]
    for run, exit in lines:
        append(tmp_path, entry(run, exit))
    found = [(each.run, each.exit) for each in read_ledger(tmp_path)]
    assert found == [("b", "started"), ("a", "finished"), ("c", "failed"), ("c", "started")]


def test_newest_has_one_entry_for_each_stage_of_each_run() -> None:
    entries = [entry("a", "stopped", 3.0), entry("b"), entry("a", "finished", 2.0)]
    assert newest(entries) == [entries[2], entries[1]]
