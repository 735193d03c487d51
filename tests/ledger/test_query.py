"""The ledger as a table: conditions, order, columns, formats."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.cli.runs import run
from nanochat_pl.common.errors import UserError
from nanochat_pl.ledger import Entry, append
from nanochat_pl.ledger.query import conditions

TIME = "2026-11-29T00:00:00+00:00"


@pytest.fixture
def runs(here: Path) -> Path:
    folder = here / "runs"
    for depth, lr, bits in ((2, 0.02, 1.5), (4, "auto", 1.25), (10, 0.01, None)):
        settings = {"model.depth": depth, "optim.lr": lr, "yes": depth == 4, "paths.runs": "runs"}
        metrics = {} if bits is None else {"val/bpb": bits}
        files = {"data.files": ["a.txt", "b.txt"]} if depth == 10 else {}
        how = {
            "steps": 1000 * depth,
            "settings": settings | files,
            "changed": settings,
            "metrics": metrics,
            "errors": metrics,
        }
        append(folder, Entry(f"d{depth}", "base", "failed" if bits is None else "finished", TIME, **how))  # type: ignore[arg-type]
    append(folder, Entry("d2", "sft", "stopped", TIME))
    append(folder, Entry("d2", "sft", "finished", TIME))
    return folder


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The names of the runs, in order."""
    assert run(["format=csv", "columns=[run]", *arguments]) == 0
    return capsys.readouterr().out.split()[1:]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("model.depth>=4", ["d4", "d10"]),
        ("model.depth>2 and val/bpb<1.4", ["d4"]),
        ("model.depth = 4.0", ["d4"]),
        ("optim.lr=auto", ["d4"]),
        ("optim.lr!='auto'", ["d2", "d10", "d2"]),
        ("optim.lr<1", ["d2", "d10"]),
        ("yes=true", ["d4"]),
        ("yes=1", []),
        ("val/bpb=null", ["d10", "d2"]),
        ("exit=failed", ["d10"]),
        ("run<d2", ["d10"]),
        ("run=d?", ["d2", "d4", "d2"]),
        ("run!=d1*", ["d2", "d4", "d2"]),
        ("run='d?'", []),
        ("errors.val/bpb<=1.25", ["d4"]),
        ("model.depth=2,10", ["d2", "d10"]),
        ("optim.lr=auto, 0.01", ["d4", "d10"]),
        ("model.depth!=2,4", ["d10", "d2"]),
        ("run='d2,d4'", []),
        ("run=d[14]*", ["d4", "d10"]),
        ("data.files=['a.txt',b.txt]", ["d10"]),
        ("data.files!=[a.txt]", ["d2", "d4", "d10", "d2"]),
    ],
)
def test_conditions(where: str, expected: list[str], runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found(capsys, f"where={where}") == expected


def test_order_and_history(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found(capsys, "stage=base", "sort=model.depth") == ["d2", "d4", "d10"]
    assert found(capsys, "stage=base", "sort=-model.depth") == ["d10", "d4", "d2"]
    assert found(capsys, "stage=base", "sort=val/bpb") == ["d4", "d2", "d10"], "without a value: last"
    assert found(capsys, "stage=base", "sort=-val/bpb") == ["d2", "d4", "d10"]
    assert found(capsys, "stage=base", "sort=optim.lr") == ["d10", "d2", "d4"]
    assert found(capsys, "stage=sft") == ["d2"] and found(capsys, "stage=sft", "history=true") == ["d2", "d2"]


def test_the_usual_table_has_the_settings_that_differ(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["stage=base", "sort=-val/bpb"]) == 0
    head, first, *rest = [line.split() for line in capsys.readouterr().out.splitlines()]
    columns = ["run", "stage", "model.depth", "optim.lr", "yes", "exit", "steps", "tokens", "seconds", "val/bpb"]
    assert head == columns and len(rest) == 2
    assert first == ["d2", "base", "2", "0.02", "false", "finished", "2,000", "0", "0.0", "1.5000"]


def test_the_seed_and_what_the_result_depends_on_come_before_what_it_does_not(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in (1, 2):
        settings = {f"evaluation.every_{i}": n for i in range(6)} | {"seed": n, "optim.matrix_lr": n / 10**5}
        settings |= {"mixture.tasks.conversations.mine.path": f"chats{n}"}
        append(here / "runs", Entry(f"d{n}", "base", "finished", TIME, settings=settings, changed=settings))
    assert run(["ledger=true"]) == 0
    out = capsys.readouterr().out
    assert out.index("seed") < out.index("optim.matrix_lr") < out.index("every_0")
    assert "1e-05" in out and "2e-05" in out, "a small setting keeps its digits"
    assert (
        "columns=[…] shows them): evaluation.every_4, evaluation.every_5, mixture.tasks.conversations.mine.path" in out
    )


def test_a_long_name_of_a_column_is_not_cut_within_a_word(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in (1, 2):
        settings = {"mixture.tasks.conversations.mine.path": f"chats{n}"}
        append(here / "runs", Entry(f"d{n}", "sft", "finished", TIME, settings=settings, changed=settings))
    assert run(["ledger=true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:2]] == [["mixture.tasks."], ["conversations."]]
    assert "mine.path" in lines[2]


def test_what_fits_nothing_says_so(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["where=exit=failed and model.depth=2"]) == 0
    assert capsys.readouterr().out == "where=exit=failed and model.depth=2: true of no entry of the ledger.\n"


def test_csv_and_json_have_all_digits(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["stage=base", "format=csv", "columns=[run,optim.lr,val/bpb]"])
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows == [["run", "optim.lr", "val/bpb"], ["d2", "0.02", "1.5"], ["d4", "auto", "1.25"], ["d10", "0.01", ""]]
    run(["format=json", "where=run=d4", "columns=[run,model.depth]"])
    assert json.loads(capsys.readouterr().out) == [{"run": "d4", "model.depth": 4}]
    run(["format=json", "where=run=d4"])
    (whole,) = json.loads(capsys.readouterr().out)
    assert whole["settings"]["model.depth"] == 4 and whole["version"] == 1


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("where=model.depht>=4", "where=model.depht: no entry has such a column; did you mean model.depth?"),
        ("sort=val/bbp", "sort=val/bbp: no entry has such a column; did you mean val/bpb"),
        ("columns=[run,dept]", "columns=dept: no entry has such a column"),
        ("where=__import__('os')", "is no condition.*\nWrite NAME OPERATOR VALUE"),
        ("where=", "is no condition"),
        ("where=model.depth>=4 or exit=failed", "conditions are joined by and alone.*\nSeveral values"),
        ("stage=bse", "stage=bse: the ledger has no such stage; did you mean base?"),
        ("format=xml", "format"),
    ],
)
def test_what_makes_no_sense(argument: str, expected: str, runs: Path) -> None:
    with pytest.raises(UserError, match=expected):
        run([argument])


def test_the_ledger_keeps_what_was_deleted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "ledger=true"]) == 0
    assert "the ledger has no entries yet" in capsys.readouterr().out
    append(here / "runs", Entry("gone", "base", "finished", TIME))
    assert main(["runs"]) == 0 and main(["runs", "ledger=true"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["run", "gone"]


def test_quotes_keep_words_together() -> None:
    (whole,) = conditions("error='out of memory and more'")
    assert whole.values == ("'out of memory and more'",)
    first, second = conditions("""error="a and b" and model.depth>=4""")
    assert (first.name, second.name) == ("error", "model.depth")
