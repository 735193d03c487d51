"""The file of the ledger: appended to by every run of every host, a whole line at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import append_line, ensure_folder, explain_disk_errors, whole_lines
from nanochat_pl.common.locks import held_lock
from nanochat_pl.ledger.entry import Entry

LEDGER = "ledger.jsonl"


def append(runs: Path, entry: Entry) -> None:
    """Add a line, under a lock and in one write; a line that somebody was killed in is ended before it.

    Raises:
        UserError: the file cannot be written.
    """
    path = ensure_folder(runs) / LEDGER
    line = json.dumps(entry.to_plain(), ensure_ascii=False, allow_nan=False).encode("utf-8")
    with explain_disk_errors(path), held_lock(runs / f".{LEDGER}.lock"):
        append_line(path, line)


def read_ledger(runs: Path) -> list[Entry]:
    """All entries, in the order in which they were written. Damaged lines are left out, with a word.

    Of lines of a start those that others of the same stage follow are left out, too: what is left of them tells of a
    process that is under way, or was killed.

    Raises:
        UserError: the file cannot be read.
    """
    path, found, damaged = runs / LEDGER, [], 0
    if not path.exists():
        return []
    for number, line in enumerate(whole_lines(path), 1):
        try:
            found.append(Entry.from_plain(json.loads(line), f"{path}, line {number}"))
        except (UserError, ValueError, RecursionError, TypeError, AttributeError):
            damaged += bool(line.strip())
    if damaged:
        rank_zero_print(f"{path}: {damaged:,} damaged line{'s are' if damaged > 1 else ' is'} left out.")
    last = {(entry.run, entry.stage): entry for entry in found}
    return [entry for entry in found if entry.exit != "started" or entry is last[entry.run, entry.stage]]


def newest(entries: Iterable[Entry]) -> list[Entry]:
    """Of each stage of each run the last entry, in the order of their first ones."""
    found: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        found[entry.run, entry.stage] = entry
    return list(found.values())
