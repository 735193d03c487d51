"""Bad inputs, from the command line to the bundle: one clear error or a counted skip each, and a run that goes on."""

from __future__ import annotations

import gzip
import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.common.files import read_json
from nanochat_pl.data.cache.background_build import BuilderProcess, Job, start_builder
from nanochat_pl.data.packing import rows
from nanochat_pl.data.sources.base import DataSettings
from nanochat_pl.data.sources.open import open_source
from tests.helpers.fake_data import cache_files
from tests.helpers.forked import Forked
from tests.helpers.small_disk import enlarge, small_disk
from tests.training.conftest import same_weights, tiny_overrides, weights_of, write_texts

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder for a run, with an empty folder ``texts``."""
    (tmp_path / "texts").mkdir()
    return tmp_path


def good_text(folder: Path) -> bytes:
    """A text file that is enough for a run."""
    return (write_texts(folder / "elsewhere") / "texts.txt").read_bytes()


def arguments(place: Path, *overrides: str) -> list[str]:
    """Of a run of two steps: ``runs/r`` unless another one is named."""
    few = ["max_steps=2", "model.depth=1", "evaluation.every_steps=0", "evaluation.num_rows=4"]
    return ["train", "run=r", *tiny_overrides(place), *few, "evaluation.sample_prompts=[]", *overrides]


def train(place: Path, *overrides: str) -> int:
    return main(arguments(place, *overrides))


def assert_one_error(place: Path, message: str, captured: Captured) -> None:
    """Said once, as an error of the data and not of the program; nothing is left of the stage."""
    said = captured.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], said.err
    assert "Traceback" not in said.err
    assert not (place / "runs" / "r" / "base").exists()


def parquet(texts: list[str | None], column: str = "text") -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({column: texts}), sink)
    return sink.getvalue().to_pybytes()


def jsonl(text: bytes, key: str = "text") -> bytes:
    """A line for each paragraph."""
    paragraphs = text.decode("utf-8").split("\n\n")
    return "".join(f'{{"{key}": "{paragraph}"}}\n' for paragraph in paragraphs).encode("utf-8")


def paragraphs(text: bytes) -> list[str | None]:
    return [*text.decode("utf-8").split("\n\n")]


# What is wrong with a file, its name, its bytes made of a good text, what is said; and its bytes when it is mended, or
# the key that helps.
Bytes = Callable[[bytes], bytes]
BROKEN: dict[str, tuple[str, Bytes, str, Bytes | str]] = {
    "no text column": (
        "a.parquet",
        lambda text: parquet(paragraphs(text), "body"),
        "a.parquet: has no column 'text'; its columns: body",
        "data.text_column=body",
    ),
    "no key": (
        "a.jsonl",
        lambda text: jsonl(text, "body"),
        "a.jsonl:1: has no key 'text'; its keys: body",
        "data.text_column=body",
    ),
    "empty": ("a.txt", lambda text: b"", "local: there is too little text", lambda text: text),
    "blank": ("a.jsonl", lambda text: jsonl(b" "), "local: there is too little text", jsonl),
    "one document": ("a.jsonl", lambda text: jsonl(text[:50]), "local: there is too little text", jsonl),
    "no parquet": ("a.parquet", lambda text: text, "no whole parquet file", lambda text: parquet(paragraphs(text))),
    "half a parquet": (
        "a.parquet",
        lambda text: parquet(paragraphs(text))[:-3000],
        "no whole parquet file",
        lambda text: parquet(paragraphs(text)),
    ),
    "half a gzip": (
        "a.jsonl.gz",
        lambda text: gzip.compress(jsonl(text))[:-20],
        "no whole gzip file",
        lambda text: gzip.compress(jsonl(text)),
    ),
    "half a line": ("a.jsonl", lambda text: jsonl(text)[:-30], "is not valid JSON", jsonl),
    "no UTF-8": ("a.txt", lambda text: text + b"caf\xe9", "is not UTF-8: byte ", lambda text: text + "é".encode()),
}


SHARDS = [
    ("half a line", "shards"),
    *(pytest.param(fault, "shards", marks=pytest.mark.slow) for fault in ("empty", "no UTF-8")),
]


@pytest.mark.parametrize(
    ("fault", "shuffle"),
    [*((fault, "global") for fault in BROKEN), *SHARDS],
)
def test_a_broken_file_is_one_error_and_mended_the_same_command_trains(
    fault: str, shuffle: str, place: Path, capsys: Captured
) -> None:
    name, broken, said, mended = BROKEN[fault]
    text = good_text(place)
    (place / "texts" / name).write_bytes(broken(text))
    assert train(place, f"data.shuffle={shuffle}") == 2
    assert_one_error(place, said, capsys)
    assert not list(place.rglob("*.tmp.*"))
    if isinstance(mended, str):
        assert train(place, f"data.shuffle={shuffle}", mended) == 0
    else:
        (place / "texts" / name).write_bytes(mended(text))
        assert train(place, f"data.shuffle={shuffle}") == 0


@pytest.mark.parametrize("shuffle", ["global", pytest.param("shards", marks=pytest.mark.slow)])
def test_empty_files_and_blank_documents_are_left_out_and_counted(shuffle: str, place: Path, capsys: Captured) -> None:
    text = good_text(place)
    (place / "texts" / "a.txt").write_bytes(text)
    (place / "texts" / "b.txt").write_bytes(b"")
    (place / "texts" / "c.jsonl").write_bytes(b"")
    (place / "texts" / "d.parquet").write_bytes(parquet([]))
    (place / "texts" / "e.parquet").write_bytes(parquet(["word", "", " \n\t", None, "\u2003"]))
    (place / "val.txt").write_bytes(text[-2000:])
    # Enough steps for all files to be read.
    keys = [f"data.shuffle={shuffle}", f"data.validation_path={place / 'val.txt'}", "max_steps=110"]
    assert train(place, *keys) == 0
    said = capsys.readouterr().out
    assert "6 files, 3 of them empty" in said
    assert "4 of " in said and "documents are empty or blank, and left out" in said
    assert said.count("local, train:") == 1


def test_of_one_file_a_part_is_held_out_and_said(place: Path, capsys: Captured) -> None:
    (place / "texts" / "a.txt").write_bytes(good_text(place))
    assert train(place) == 0
    assert "1 file, " in (said := capsys.readouterr().out) and "5.00% of the documents are held out" in said
    source = open_source(DataSettings(name="local", path=str(place / "texts"), txt_document_chars=200), place / "cache")
    splits = [{text for shard in source.shards(split) for text in shard.documents()} for split in ("train", "val")]
    assert splits[0] and splits[1] and not splits[0] & splits[1]
    data = read_json(place / "runs/r/base/bundle/stage.json")["data"]
    assert data["validation_tokens"] > 0 and data["train_tokens"] > 10 * data["validation_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", ["global", "shards"])
def test_a_document_of_50_mb_is_trained_on(shuffle: str, place: Path) -> None:
    text = good_text(place)
    line = text.replace(b"\n\n", b" ")
    long = line * (50_000_000 // len(line))
    (place / "texts" / "a.jsonl").write_bytes(jsonl(text) + jsonl(long.replace(b"\n", b" ")))
    assert train(place, f"data.shuffle={shuffle}") == 0
    shards = open_source(DataSettings(name="local", path=str(place / "texts")), place / "cache").shards("train")
    assert max(len(document) for document in shards[0].documents()) == len(long)
    assert read_json(place / "runs/r/base/bundle/stage.json")["data"]["train_tokens"] > 10_000_000


def tokens_on_the_disk(cache: Path) -> dict[str, bytes]:
    """What the cache vouches for, by its place."""
    return {
        path.parent.name: path.read_bytes()
        for path in cache_files(cache / "tokens", "tokens.bin")
        if (path.parent / "manifest.json").exists()
    }


def write_four_files(place: Path) -> None:
    documents = good_text(place).split(b"\n\n")
    for number in range(4):
        (place / "texts" / f"{number}.txt").write_bytes(b"\n\n".join(documents[number::4] * 20))


@pytest.mark.parametrize(
    ("shuffle", "size"), [("global", "600k"), pytest.param("shards", "150k", marks=pytest.mark.slow)]
)
def test_a_disk_that_fills_while_caching(
    shuffle: str, size: str, place: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is seen before anything is tokenized; and where it fills only then, in one error too."""
    write_four_files(place)
    assert train(place, "run=whole", f"data.shuffle={shuffle}") == 0
    keys = [f"data.shuffle={shuffle}", f"paths.cache={place / 'small'}"]
    capsys.readouterr()
    with small_disk(place / "small", size) as disk:
        assert train(place, *keys) == 2
        assert_one_error(place, "the tokens of the text and the index of their rows take about", capsys)
        with monkeypatch.context() as unchecked:  # as where others fill the disk meanwhile
            unchecked.setattr(
                "nanochat_pl.training.stage_data.text.require_cache_room", lambda cache_dir, num_bytes: None
            )
            assert train(place, *keys) == 2
        assert_one_error(place, "the disk is full", capsys)
        # A builder of shards that is ended in the middle of one leaves that; who builds it next clears it away.
        assert shuffle == "shards" or not list(disk.rglob("*.tmp.*"))
        done = tokens_on_the_disk(disk)
        assert (shuffle == "shards" or done) and len(done) < 8
        enlarge(disk, "30m")
        assert train(place, *keys) == 0
        assert tokens_on_the_disk(disk).items() >= done.items() and not list(disk.rglob("*.tmp.*"))
    assert same_weights(weights_of(place / "runs" / "r", "base"), weights_of(place / "runs" / "whole", "base"))


def in_a_process(arguments: list[str], before: str = "") -> Forked:
    """The command in a process of its own, with some lines of Python run before it."""
    lines = f"import sys\nfrom nanochat_pl.cli.main import main\n{before}\nsys.exit(main(sys.argv[1:]))"
    return Forked(["-c", lines, *arguments])


ENCODE_OR_DIE = """
import os, pathlib, signal
from nanochat_pl.tokenizer import Tokenizer

encode = Tokenizer.encode_array

def encode_or_die(tokenizer, text):
    if list(pathlib.Path({cache!r}, "tokens").rglob("manifest.json")):  # of a file that is done; the others are not
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(tokenizer, text)

Tokenizer.encode_array = encode_or_die
"""


@pytest.mark.slow
def test_a_cache_killed_half_built(place: Path) -> None:
    write_four_files(place)
    assert train(place, "stage=tokenizer") == 0
    killed = in_a_process(arguments(place), ENCODE_OR_DIE.format(cache=str(place / "cache")))
    assert killed.wait(120) == -signal.SIGKILL
    done = tokens_on_the_disk(place / "cache")
    assert done
    assert train(place) == 0
    found = tokens_on_the_disk(place / "cache")
    assert len(found) > len(done) and found.items() >= done.items()
    assert train(place, "run=whole", f"paths.cache={place / 'other'}") == 0
    assert found == tokens_on_the_disk(place / "other")
    assert same_weights(weights_of(place / "runs" / "r", "base"), weights_of(place / "runs" / "whole", "base"))


@pytest.mark.slow
def test_a_builder_killed_while_the_training_waits(
    place: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is tokenized ahead is so in a process of its own, and the system takes the largest where memory is full."""

    def start_and_kill(job: Job, cache_dir: Path) -> BuilderProcess:
        builder = start_builder(job, cache_dir)
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        builder.tell(0)  # what stands there where it was killed at once: of files this small it may have been faster
        return builder

    write_four_files(place)
    with monkeypatch.context() as patch:
        patch.setattr(rows, "start_builder", start_and_kill)
        assert train(place, "data.shuffle=shards") == 2
    assert_one_error(place, "the process that tokenizes ahead of the training was ended", capsys)
    assert train(place, "data.shuffle=shards") == 0


def test_two_runs_that_build_the_same_cache_at_once(place: Path) -> None:
    write_four_files(place)
    both = [in_a_process(arguments(place, f"run={run}")) for run in ("one", "other")]
    assert [process.wait(120) for process in both] == [0, 0]
    runs = place / "runs"
    assert same_weights(weights_of(runs / "one", "base"), weights_of(runs / "other", "base"))
    found = tokens_on_the_disk(place / "cache")
    assert train(place, f"paths.cache={place / 'other'}") == 0
    assert tokens_on_the_disk(place / "other") == found
