"""`nanochat-pl doctor`: the data of a stage, prepared as a training does, and what is said of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.data.sources.base import DataSettings, Source
from nanochat_pl.data.sources.open import open_source
from tests.cli.test_download import hub  # noqa: F401
from tests.data.test_hub import parquet
from tests.helpers.hub_server import HubServer
from tests.training.conftest import sft_overrides, tiny_overrides, write_texts

Captured = pytest.CaptureFixture[str]


def of(folder: Path, *without: str) -> list[str]:
    """The tiny settings, but for some keys."""
    return ["stage=base", *(text for text in tiny_overrides(folder) if not text.startswith(without or ("none",)))]


def found(folder: Path, name: str = "d2-base") -> dict[str, Any]:
    return json.loads((folder / "runs" / "doctor" / name / "doctor.json").read_text(encoding="utf-8"))


def source_of(folder: Path) -> Source:
    """The source of the tiny settings."""
    settings = DataSettings(name="local", path=str(folder / "texts"), txt_document_chars=200)
    return open_source(settings, folder / "cache")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts and a finished base stage."""
    folder = tmp_path_factory.mktemp("doctor")
    write_texts(folder / "texts")
    assert main(["train", *of(folder, "max_steps"), "max_steps=2"]) == 0
    return folder


def test_good_data(here: Path, capsys: Captured) -> None:
    write_texts(here / "texts")
    assert main(["doctor", *of(here)]) == 0
    said = capsys.readouterr()
    metrics = found(here)
    shards = [shard for split in ("train", "val") for shard in source_of(here).shards(split)]
    documents = [text for shard in shards for text in shard.documents()]
    splits = metrics["found"]["train"], metrics["found"]["validation"]
    assert sum(split["documents"] for split in splits) == len(documents)
    assert sum(split["characters"]["total"] for split in splits) == len("".join(documents))
    rows = metrics["rows"][""]
    assert (rows["rows"], metrics["steps"], metrics["rows_per_step"], rows["padded_share"]) == (320, 40, 8, 0.0)
    assert rows["epochs"] == pytest.approx(320 * 33 / metrics["found"]["train"]["tokens"]["total"], rel=0.1)
    assert not metrics["fails"]
    assert "Evaluation sets in the training text" in said.out and "runs/doctor/d2-base/lengths.svg" in said.out
    assert (here / "runs" / "doctor" / "d2-base" / "lengths.svg").read_text(encoding="utf-8").count("row: 32") == 2
    assert [path.name for path in (here / "runs").iterdir()] == ["doctor"]  # no folder of a run


def test_the_doctor_prepares_what_a_training_takes(trained: Path, capsys: Captured) -> None:
    """Nothing is tokenized or packed a second time: the same caches."""

    def folders(kind: str) -> set[Path]:
        return set((trained / "cache" / kind).iterdir())

    before = folders("tokens"), folders("rows")
    assert main(["doctor", *of(trained, "max_steps"), "max_steps=2"]) == 0
    assert (folders("tokens"), folders("rows")) == before
    assert not (trained / "cache" / "doctor").exists()  # the run has a tokenizer
    assert "Training a tokenizer" not in capsys.readouterr().out


def test_duplicates_and_overlap_are_found(here: Path, capsys: Captured) -> None:
    texts = write_texts(here / "texts") / "texts.txt"
    whole = texts.read_text(encoding="utf-8")
    item = "this question of an evaluation set was copied into the text word by word by somebody"
    texts.write_text(f"{item}.\n\n" * 2 + whole, encoding="utf-8")
    bundle = here / "bundle" / "eval_data"
    bundle.mkdir(parents=True)
    (bundle / "quiz.jsonl").write_text(json.dumps({"q": item, "a": "x"}) + "\n" + '{"q": "y"}', encoding="utf-8")
    # Cut at blank lines: each document is one of the texts.
    keys = [*of(here, "data.txt"), "data.txt_document_chars=90"]
    assert main(["doctor", *keys, f"eval_bundle={here / 'bundle'}"]) == 0
    said = capsys.readouterr().out
    metrics = found(here)["found"]
    quiz = next(each for each in metrics["overlaps"] if each["name"] == "quiz")
    assert (quiz["items"], quiz["short"], quiz["overlapping"]) == (2, 1, 1)
    assert quiz["example"].startswith("this question of an evaluation set")
    assert metrics["duplicates"]["copies"] >= 1
    assert "quiz: 100.0% of 1 items stand in the training text" in said


def test_a_row_is_shown_with_its_documents(trained: Path, capsys: Captured) -> None:
    keys = [*of(trained, "max_steps"), "max_steps=2"]
    assert main(["doctor", *keys, "row=11"]) == 0
    said = capsys.readouterr().out
    assert "Row 11 of 16 (from 0), in step 2 of 2: 33 of 33 places are filled." in said
    pieces = re.findall(r"\d+\. (\S+), document ([\d,]+), tokens (\d+) to (\d+) of (\d+):\n +(['\"])(.*)\6\n", said)
    assert pieces and sum(int(stop) + 1 - int(start) + 1 for _, _, start, stop, *_ in pieces) == 33
    (shard,) = source_of(trained).shards("train")
    documents = list(shard.documents())
    for name, number, *_, text in pieces:
        assert name == shard.name and text.strip("… ")[:20] in " ".join(documents[int(number)].split())


def test_a_row_that_is_not_there_is_said(trained: Path, capsys: Captured) -> None:
    assert main(["doctor", *of(trained, "max_steps"), "max_steps=2", "row=16"]) == 2
    assert "row=16: the training has 16 rows, 0 … 15 (2 steps of 8)." in capsys.readouterr().err
    assert main(["doctor", *of(trained), "row=-1"]) == 2
    assert "row=-1: is below 0" in capsys.readouterr().err


def test_conversations(trained: Path, capsys: Captured) -> None:
    lines = [
        [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": "long " * n}] for n in range(9)
    ]
    good = [json.dumps({"messages": line}) for line in lines[1:]]
    (trained / "chats.jsonl").write_text("\n".join([*good, "{"]), encoding="utf-8")
    mine = [f"mixture.tasks.conversations.mine.path={trained / 'chats.jsonl'}", "mixture.tasks.identity.repeat=2"]
    keys = [text for text in sft_overrides(trained) if "identity" not in text and not text.startswith("max_steps")]
    assert main(["doctor", *keys, *mine, "data.max_bad_fraction=0.2"]) == 0
    said = capsys.readouterr().out
    metrics = found(trained, "d2-sft")
    assert (
        metrics["bad_rows"] == {"mine: invalid JSON": 1} and "Rows of files left out: 1 (mine: invalid JSON)." in said
    )
    duplicates = metrics["found"]["duplicates"]
    assert duplicates["copies"] > 0 and duplicates["wanted"] > 300
    assert 0 < metrics["rows"][""]["target_share"] < 1
    assert 0 < metrics["found"]["train"]["target_share"] < 1
    assert {"arithmetic", "identity", "mine"} == {each["name"] for each in metrics["found"]["overlaps"]}
    assert main(["doctor", *keys, *mine, "data.max_bad_fraction=0.2", "row=0"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"1\. (arithmetic|identity), conversation \d+, tokens 0 to \d+ of \d+:\n +'<\|user_start\|>", said)


def test_too_many_bad_conversations_fail(trained: Path, capsys: Captured) -> None:
    (trained / "bad.jsonl").write_text("{\n{\n" + '{"messages": []}\n' * 3, encoding="utf-8")
    mine = f"mixture.tasks.conversations.mine.path={trained / 'bad.jsonl'}"
    assert main(["doctor", *sft_overrides(trained), mine]) == 1
    said = capsys.readouterr().out
    assert "fails: " in said and "bad.jsonl" in said
    assert found(trained, "d2-sft")["fails"]


def column(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path)
    return path


@pytest.mark.parametrize(
    ("texts", "changed", "problem", "fix"),
    [
        (["", "  "], [], "text", "data.path"),
        (
            ["the only document " * 40] * 3,
            ["tokenizer.vocab_size=265"],
            "nothing of it is left",
            "data.validation_path",
        ),
        (None, ["max_steps=null", "model.depth=12"], "plan's own horizon", "max_steps="),
        (None, ["tokenizer.vocab_size=5000"], "tokenizer.vocab_size=5000", "Set tokenizer.vocab_size="),
    ],
)
def test_what_would_break_a_run_fails(
    here: Path, texts: list[str] | None, changed: list[str], problem: str, fix: str, capsys: Captured
) -> None:
    write_texts(here / "texts")
    keys = of(here, *(text.split("=")[0] + "=" for text in changed))
    if texts is not None:
        keys = [*keys, f"data.path={column(here / 'p' / 'x.parquet', texts)}"]
    assert main(["doctor", *keys, *changed]) == 1
    fails = re.findall(r"^fails: .*\n.*", capsys.readouterr().out, re.MULTILINE)
    assert any(problem in each and fix in each for each in fails), fails
    name = next(path.name for path in (here / "runs" / "doctor").iterdir())
    assert found(here, name)["fails"]


def test_cropping_is_a_warning(here: Path, capsys: Captured) -> None:
    write_texts(here / "texts")
    assert main(["doctor", *of(here), "data.long_documents=crop"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"warning: \d+% of the text is trained on.*\n +Set data.long_documents=split", said)


def test_the_rows_of_several_sources(here: Path, capsys: Captured) -> None:
    for name in ("one", "two"):
        write_texts(here / name)
    other = here / "two" / "texts.txt"
    other.write_text(other.read_text(encoding="utf-8").upper(), encoding="utf-8")
    sources = [
        f"data.sources.{name}.{key}"
        for name, weight in (("one", 3), ("two", 1))
        for key in ("name=local", f"path={here / name}", f"weight={weight}", "txt_document_chars=200")
    ]
    keys = [*of(here, "data"), "data.name=mixture", *sources]
    assert main(["doctor", *keys]) == 0
    metrics = found(here)
    assert {name: rows["rows"] for name, rows in metrics["rows"].items()} == {"one": 240, "two": 80}
    assert metrics["found"]["train"]["longest"][0][0].startswith(("one/", "two/"))
    capsys.readouterr()
    assert main(["doctor", *keys, "row=4"]) == 0
    said = capsys.readouterr().out
    name = re.search(r"Row 4 of 320.*: 33 of 33 .*\n +1\. (one|two)/texts\.txt, document", said)
    assert name is not None
    text = re.findall(r"\n +'(.*)'\n", said)[0]
    assert text.isupper() == (name[1] == "two")


def test_shards_that_come_in_one_after_the_other(here: Path, capsys: Captured) -> None:
    texts = (write_texts(here / "all") / "texts.txt").read_text(encoding="utf-8").split("\n\n")
    for number in range(3):
        column(here / "texts" / f"{number}.parquet", texts[number::3])
    assert main(["doctor", *of(here), "data.shuffle=shards"]) == 0
    metrics = found(here)
    rows = metrics["rows"][""]
    assert (rows["rows"], rows["target_share"]) == (320, 1.0)
    assert rows["epochs"] == pytest.approx(320 * 32 / metrics["found"]["train"]["tokens"]["total"], rel=0.1)


def test_missing_shards_are_named(hub: HubServer, here: Path, capsys: Captured) -> None:  # noqa: F811
    texts = (write_texts(here / "texts") / "texts.txt").read_text(encoding="utf-8").split("\n\n")
    hub.add("some-owner/small", {f"part-{n}.parquet": parquet([*texts[n::4]]) for n in range(4)})
    keys = ["data=hub", "data.repo=some-owner/small", f"paths.cache={here / 'cache'}"]
    rest = of(here, "data", "paths.cache", "max_steps")
    assert main(["doctor", *rest, *keys, "max_steps=60"]) == 1
    assert "fails: data=hub: nothing of some-owner/small" in capsys.readouterr().out
    assert main(["download", *keys, "num_shards=1"]) == 0
    assert main(["doctor", *rest, *keys, "max_steps=60"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"warning: 1 of 3 training files.*\n.*nanochat-pl download .*num_shards=[23]", said)


@pytest.mark.slow
def test_the_record_of_a_run_is_read_and_never_written(hub: HubServer, here: Path) -> None:  # noqa: F811
    """A run goes on with the files that it was begun with; the doctor came by and noted others."""
    texts = (write_texts(here / "texts") / "texts.txt").read_text(encoding="utf-8").split("\n\n")
    hub.add("some-owner/small", {f"part-{n}.parquet": parquet([*texts[n::4]]) for n in range(4)})
    keys = ["data=hub", "data.repo=some-owner/small", f"paths.cache={here / 'cache'}"]
    command = [*of(here, "data", "paths.cache", "max_steps"), *keys, "run=hub"]
    assert main(["download", *keys, "num_shards=1"]) == 0
    assert main(["train", *command, "max_steps=2"]) == 0
    folder = here / "runs" / "hub" / "base"
    assert main(["download", *keys, "num_shards=3"]) == 0
    for finished in (True, False):
        if not finished:  # as it was before its first resume file
            (folder / "finished.json").unlink()
            for path in (folder / "checkpoints").iterdir():
                path.unlink()
        before = {path: path.read_bytes() for path in (here / "runs" / "hub").rglob("*") if path.is_file()}
        assert folder / "data.json" in before
        assert main(["doctor", *command, "max_steps=2"]) in (0, 1)
        assert {path: path.read_bytes() for path in (here / "runs" / "hub").rglob("*") if path.is_file()} == before


def test_mistakes_are_not_findings(here: Path, capsys: Captured) -> None:
    assert main(["doctor", "data.pathh=x"]) == 2
    assert main(["doctor", *of(here), "eval_bundle=nowhere"]) == 2
    assert "eval_bundle=nowhere" in capsys.readouterr().err
    assert main(["doctor", "stage=sft", "run=none", f"paths.runs={here / 'runs'}"]) == 2
    assert main(["doctor", "stage=tokenizer"]) == 2
    assert "a tokenizer is trained on text without rows" in capsys.readouterr().err
    assert not (here / "runs").exists()
