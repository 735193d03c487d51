"""Data sets of a hub: a real client against a server on this machine."""

from __future__ import annotations

import io
import json
import logging
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.files.split_names import split_in_name
from nanochat_pl.data.hub import errors as hub_errors
from nanochat_pl.data.hub.download import fetch_files
from nanochat_pl.data.hub.manifest import known_manifest, open_manifest
from nanochat_pl.data.sources.base import DataSettings, Source, Split, WeightedSource
from nanochat_pl.data.sources.hub import HubFiles
from nanochat_pl.data.sources.open import open_source, read_chosen, write_chosen
from tests.helpers.hub_server import Answer, HubServer, serving_this_process

REPO = "some-owner/some.texts"


def parquet(texts: list[str | None], column: str = "text", row_group_size: int = 50) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({column: texts}), sink, row_group_size=row_group_size, compression="none")
    return sink.getvalue()


def texts_of_shard(number: int) -> list[str]:
    return [f"Document {i} of shard {number}: {'words and more ' * (i % 9)}" for i in range(120)]


SHARDS = {f"shard_{n:05d}.parquet": parquet([*texts_of_shard(n)]) for n in range(5)}
FILES = {**SHARDS, "README.md": b"# Texts\n", ".gitattributes": b"*.parquet filter=lfs\n"}
IN_GIT = frozenset(("README.md", ".gitattributes"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with the data set REPO."""
    with serving_this_process(tmp_path / "hf", monkeypatch) as server:
        server.add(REPO, FILES, IN_GIT)
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long would have been waited."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def settings(**keys: object) -> DataSettings:
    return DataSettings(**{"name": "hub", "repo": REPO, **keys})  # type: ignore[arg-type]


def downloaded(cache: Path, num_shards: int = 4, **keys: object) -> HubFiles:
    source = HubFiles(settings(**keys), cache, ask_hub=True)
    source.fetch(num_shards)
    return source


def texts_of(source: Source, split: Split) -> list[str]:
    return [text for shard in source.shards(split) for text in shard.documents()]


def fetch(repo: str, path: str, cache: Path) -> Path:
    manifest = open_manifest(repo, "main", cache)
    return fetch_files(manifest, [manifest.file(path)], cache).paths[0]


def test_everything_comes_and_is_right(hub: HubServer, tmp_path: Path) -> None:
    source = HubFiles(settings(), tmp_path / "cache", ask_hub=True)
    fetched = source.fetch(4, parallel=3)
    assert fetched.num_new == 5 and fetched.new_bytes == sum(map(len, SHARDS.values()))
    assert {path.name: path.read_bytes() for path in fetched.paths} == SHARDS
    assert texts_of(source, "train") == [text for n in range(4) for text in texts_of_shard(n)]
    assert texts_of(source, "val") == texts_of_shard(4)
    assert len(hub.downloads()) == 5


def test_the_manifest_names_commit_sizes_hashes_and_rows(hub: HubServer, tmp_path: Path) -> None:
    source = downloaded(tmp_path / "cache", 2)
    manifest = known_manifest(REPO, "main", tmp_path / "cache")
    assert manifest == source.manifest and manifest.commit == hub.repos[REPO].branches["main"]
    assert [file.path for file in manifest.files] == sorted(FILES)
    assert all(file.bytes == len(FILES[file.path]) for file in manifest.files)
    assert all((file.sha256 is None) == (file.path in IN_GIT) for file in manifest.files)
    rows = {file.path: (file.row_groups, file.rows) for file in manifest.files if file.rows is not None}
    assert rows == {f"shard_{n:05d}.parquet": (3, 120) for n in (0, 1, 4)}


def test_again_nothing_is_fetched_and_nobody_is_asked(hub: HubServer, tmp_path: Path) -> None:
    downloaded(tmp_path / "cache")
    hub.requests.clear()
    again = HubFiles(settings(), tmp_path / "cache", ask_hub=True)
    assert again.fetch(4).num_new == 0
    assert hub.requests == []


def test_a_moved_branch_changes_nothing_until_it_is_asked_for(hub: HubServer, tmp_path: Path) -> None:
    first = downloaded(tmp_path / "cache", 1)
    commit, fingerprint = first.manifest.commit, first.fingerprint
    newer = hub.add(REPO, {**FILES, "shard_00001.parquet": parquet(["new"]), "shard_00005.parquet": parquet(["val"])})
    kept = downloaded(tmp_path / "cache", 1)
    assert (kept.manifest.commit, kept.fingerprint) == (commit, fingerprint)
    fresh = HubFiles(settings(), tmp_path / "cache", ask_hub=True, refresh=True)
    assert fresh.manifest.commit == newer
    assert fresh.manifest.file("shard_00000.parquet").rows == 120  # the same file as before
    assert [file.path for file in fresh.val_files] == ["shard_00005.parquet"]
    old = HubFiles(settings(revision=commit), tmp_path / "cache", ask_hub=True)
    assert [file.path for file in old.val_files] == ["shard_00004.parquet"]


def test_validation_does_not_depend_on_what_is_here(hub: HubServer, tmp_path: Path) -> None:
    """Validation was the last file on the disk, so it changed while the next ones were coming."""
    seen = []
    for num_shards in (1, 3, 4):
        source = downloaded(tmp_path / "cache", num_shards)
        assert len(source.shards("train")) == num_shards
        seen.append([(shard.name, shard.fingerprint) for shard in source.shards("val")])
    assert seen == [seen[0]] * 3 and seen[0][0][0] == "shard_00004.parquet"
    path = source.manifest.at_hand(source.val_files[0])
    assert path is not None
    path.unlink()
    source = HubFiles(settings(), tmp_path / "cache")
    with pytest.raises(UserError, match=r"shard_00004\.parquet .* is not here[^$]*nanochat-pl download data=hub"):
        source.shards("val")
    assert len(source.shards("train")) == 4


def test_of_one_file_a_part_is_held_out_and_said(hub: HubServer, tmp_path: Path) -> None:
    """With a single shard the train split was empty, and the loader waited for ever."""
    hub.add("some-owner/one", {"all.parquet": SHARDS["shard_00000.parquet"]})
    source = downloaded(tmp_path / "cache", 1, repo="some-owner/one", validation_fraction=0.1)
    train, val = texts_of(source, "train"), texts_of(source, "val")
    assert sorted([*train, *val]) == sorted(texts_of_shard(0)) and 1 <= len(val) < 40
    assert "validated on 10.00% of its documents" in source.describe()
    assert source.shards("train")[0].fingerprint != source.shards("val")[0].fingerprint


def test_splits_that_are_named_are_taken(hub: HubServer, tmp_path: Path) -> None:
    names = ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "validation-00000-of-00001")
    hub.add("some-owner/named", {f"main/{name}.parquet": parquet([name]) for name in names})
    source = downloaded(tmp_path / "cache", 9, repo="some-owner/named")
    assert texts_of(source, "train") == [*names[:2]]
    assert texts_of(source, "val") == ["validation-00000-of-00001"]
    hub.add("some-owner/tested", {f"main/{name}.parquet": parquet([name]) for name in names[:3]})
    assert texts_of(downloaded(tmp_path / "cache", 9, repo="some-owner/tested"), "val") == ["test-00000-of-00001"]


def test_a_connection_that_breaks_in_the_middle_is_taken_up_there(
    hub: HubServer, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)  # usually 10 MiB: it goes on after the last whole one
    big = parquet([f"{n:06d} " * 40 for n in range(20_000)])
    hub.add("some-owner/big", {"a.parquet": big})
    hub.fail("GET", r"/resolve/", Answer(stop_at=0.5))
    path = fetch("some-owner/big", "a.parquet", tmp_path / "cache")
    assert path.read_bytes() == big
    (_, first), (_, second) = hub.downloads()
    assert first == "" and second == f"bytes={len(big) // 2 // 2**16 * 2**16}-"


def test_a_connection_that_is_reset_is_made_anew(hub: HubServer, tmp_path: Path, waits: list[float]) -> None:
    hub.fail("GET", r"/resolve/.*00001", Answer(stop_at=0.5, reset=True))
    assert texts_of(downloaded(tmp_path / "cache"), "train")[120:240] == texts_of_shard(1)


def test_a_download_that_stays_cut_off_never_passes(hub: HubServer, tmp_path: Path, waits: list[float]) -> None:
    """A shard that had come in half was taken for a whole one."""
    hub.fail("GET", r"/resolve/.*00002", *[Answer(stop_at=0.0)] * 60)
    source = HubFiles(settings(), tmp_path / "cache", ask_hub=True)
    with pytest.raises(UserError, match=r"some-owner/some\.texts: shard_00002\.parquet: the server cannot be reached"):
        source.fetch(4)
    assert source.manifest.at_hand(source.manifest.file("shard_00002.parquet")) is None
    assert not list((tmp_path / "hf").rglob("*.incomplete"))


def flip(data: bytes) -> bytes:
    return data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]


def test_a_damaged_shard_is_found_and_fetched_again(
    hub: HubServer, tmp_path: Path, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("GET", r"/resolve/.*00002", Answer(change=flip))
    source = downloaded(tmp_path / "cache")
    assert texts_of(source, "train")[240:360] == texts_of_shard(2)
    assert [path[-19:] for path, _ in hub.downloads()].count("shard_00002.parquet") == 2
    assert "shard_00002.parquet: what came is not what the hub lists" in capsys.readouterr().out


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize("change", [flip, cut])
def test_a_shard_that_stays_damaged_is_an_error(
    hub: HubServer, tmp_path: Path, waits: list[float], change: Callable[[bytes], bytes]
) -> None:
    """What came was never compared with what should have come."""
    hub.fail("GET", r"/resolve/.*00002", *[Answer(change=change)] * 9)
    with pytest.raises(UserError, match=r"shard_00002\.parquet: came damaged"):
        downloaded(tmp_path / "cache")
    assert 2 <= [path[-19:] for path, _ in hub.downloads()].count("shard_00002.parquet") <= 3


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_shard_that_is_damaged_on_the_disk_is_found(
    hub: HubServer, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = downloaded(tmp_path / "cache")
    path = source.manifest.at_hand(source.manifest.file("shard_00001.parquet"))
    assert path is not None
    path.write_bytes(flip(path.read_bytes()) if damage == "flip" else path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"shard_00001\.parquet: is damaged[^$]*nanochat-pl download"):
        texts_of(source, "train")
    if damage == "cut":  # its size tells
        again = HubFiles(settings(), tmp_path / "cache")
        assert [shard.name[-9:-8] for shard in again.shards("train")] == ["0", "2", "3"]
    hub.requests.clear()
    assert source.fetch(4).num_new == 1
    assert "shard_00001.parquet is damaged on the disk" in capsys.readouterr().out
    assert len(hub.downloads()) == 1
    assert texts_of(source, "train")[120:240] == texts_of_shard(1)


def test_files_outside_of_lfs_are_verified_too(hub: HubServer, tmp_path: Path, waits: list[float]) -> None:
    hub.add("some-owner/small", {"a.jsonl": b'{"text": "a"}\n'}, in_git=frozenset({"a.jsonl"}))
    hub.fail("GET", r"/resolve/", Answer(change=lambda data: data.replace(b'"a"', b'"b"')))
    path = fetch("some-owner/small", "a.jsonl", tmp_path / "cache")
    assert path.read_bytes() == b'{"text": "a"}\n' and len(hub.downloads()) == 2
    manifest = known_manifest("some-owner/small", "main", tmp_path / "cache")
    assert manifest is not None and manifest.files[0].sha256 is not None


@pytest.mark.parametrize("request_to", ["/api/datasets/[^/]+/[^/]+/revision", "/tree/", "HEAD", "/resolve/"])
def test_too_many_requests_are_waited_for(
    hub: HubServer, tmp_path: Path, waits: list[float], request_to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    method, path = ("HEAD", "/resolve/") if request_to == "HEAD" else ("GET", request_to)
    hub.fail(method, path, *[Answer(429, {"Retry-After": "7"})] * (3 if method == "HEAD" else 2))
    assert downloaded(tmp_path / "cache", 1).fetch(1).num_new == 0
    assert max(waits) >= 7
    said = capsys.readouterr().out
    assert "trying again in 7 s" in said or "Waiting 8.0s" in said


def test_patience_ends(hub: HubServer, tmp_path: Path, waits: list[float]) -> None:
    hub.fail("GET", "/api/datasets/", *[Answer(429, {"Retry-After": "7"})] * 99)
    with pytest.raises(UserError, match=r"too many requests \(429\)[^$]*in 7 seconds"):
        downloaded(tmp_path / "cache")
    assert waits == [7.0, 7.0]


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_in_trouble(hub: HubServer, tmp_path: Path, waits: list[float], status: int) -> None:
    hub.fail("GET", "/resolve/", Answer(status))
    downloaded(tmp_path / "cache")
    hub.fail("GET", "/api/datasets/", *[Answer(status)] * 9)
    with pytest.raises(UserError, match=f"the server answers with error {status}"):
        downloaded(tmp_path / "cache", repo="some-owner/other")


def test_what_is_not_there_is_named(hub: HubServer, tmp_path: Path, waits: list[float]) -> None:
    with pytest.raises(UserError, match=r"some-owner/nothing: the hub has no such data set"):
        downloaded(tmp_path / "cache", repo="some-owner/nothing")
    with pytest.raises(UserError, match=r"some-owner/some\.texts: v9: has no such revision[^$]*data\.revision"):
        downloaded(tmp_path / "cache", revision="v9")
    with pytest.raises(UserError, match=r"file='shard_00002\.parket': .*did you mean shard_00002\.parquet"):
        fetch(REPO, "shard_00002.parket", tmp_path / "cache")
    with pytest.raises(UserError, match=r"data\.files='train/\*': .* has no such file"):
        downloaded(tmp_path / "cache", files="train/*")
    with pytest.raises(
        UserError, match=r"data\.repo='some-owner/some\.texts': no file of it ends with .*there are \.md"
    ):
        downloaded(tmp_path / "cache", files="*.md")
    hub.repos[REPO].gated = True
    with pytest.raises(UserError, match=r"is gated[^$]*datasets/some-owner/some\.texts[^$]*HF_TOKEN"):
        HubFiles(settings(), tmp_path / "cache2", ask_hub=True)
    assert waits == []


def test_a_file_that_has_gone_from_the_hub(hub: HubServer, tmp_path: Path) -> None:
    source = HubFiles(settings(), tmp_path / "cache", ask_hub=True)
    del hub.repos[REPO].commits[source.manifest.commit]["shard_00003.parquet"]
    with pytest.raises(UserError, match=r"shard_00003\.parquet: there is no such file .*404[^$]*refresh=true"):
        source.fetch(4)
    # The others have come, and stay.
    assert [shard.name for shard in source.shards("train")] == [f"shard_{n:05d}.parquet" for n in range(3)]


def test_without_any_network(
    hub: HubServer, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    source = downloaded(tmp_path / "cache", 2)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        for fetch_more in (lambda: source.fetch(3), lambda: downloaded(tmp_path / "empty", 1)):
            with pytest.raises(UserError) as raised:
                fetch_more()
            assert "the server cannot be reached" in str(raised.value)
            for way_out in ("HF_HUB_OFFLINE", "data=python_docs", "data=local", "HF_ENDPOINT"):
                assert way_out in raised.value.fix
        assert waits == [1.0, 2.0] * 2
        # What is here goes on working.
        assert texts_of(open_source(settings(), tmp_path / "cache"), "val") == texts_of_shard(4)
        assert source.fetch(2).num_new == 0


def test_a_damaged_file_that_cannot_be_fetched_again(
    hub: HubServer, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was said that the answer is not that of a hub."""
    from huggingface_hub import constants

    source = downloaded(tmp_path / "cache", 1)
    file = source.manifest.file("shard_00000.parquet")
    path = source.manifest.at_hand(file)
    assert path is not None
    path.write_bytes(b"PAR1")
    hub.fail("HEAD", "/resolve/", *[Answer(429, {"Retry-After": "7"})] * 30)
    with pytest.raises(UserError, match="too many requests"):
        fetch_files(source.manifest, [file], tmp_path / "cache")
    hub.mend()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids"):
        fetch_files(source.manifest, [file], tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert fetch_files(source.manifest, [file], tmp_path / "cache").num_new == 1
    path.write_bytes(b"PAR1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(UserError, match="the server cannot be reached"):
            fetch_files(source.manifest, [file], tmp_path / "cache")


def test_offline_mode_is_kept_to(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    source = downloaded(tmp_path / "cache", 2)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert source.fetch(2).num_new == 0
    for fetch_more in (lambda: source.fetch(3), lambda: downloaded(tmp_path / "empty", 1)):
        with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids"):
            fetch_more()
    assert hub.requests == []


def test_an_answer_that_is_no_hubs(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HubServer, "answer_for", lambda *_: Answer(200, {"Content-Type": "text/html"}))
    with pytest.raises(UserError, match=r"the answer is not that of a hub[^$]*HF_ENDPOINT"):
        downloaded(tmp_path / "cache")


def test_a_full_disk_is_said_before_anything_is_fetched(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_errors, "free_bytes", lambda path: 10)
    with pytest.raises(UserError, match=r"is full: [\d.]+ GB are needed[^$]*HF_HOME"):
        downloaded(tmp_path / "cache")
    assert hub.downloads() == []


def test_a_disk_that_fills_on_the_way(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "hf_hub_download", full)
        with pytest.raises(UserError, match=r"the disk of .* is full"):
            downloaded(tmp_path / "cache")
    assert downloaded(tmp_path / "cache").shards("train")


def test_a_file_that_is_no_parquet_is_named(hub: HubServer, tmp_path: Path) -> None:
    hub.add("some-owner/wrong", {"a.parquet": b"PAR? no", "b.parquet": SHARDS["shard_00000.parquet"]})
    with pytest.raises(UserError, match=r"a\.parquet: is no whole parquet file"):
        downloaded(tmp_path / "cache", repo="some-owner/wrong")
    hub.add("some-owner/column", {"a.parquet": parquet(["x"], "content"), "b.parquet": parquet(["x"], "content")})
    source = downloaded(tmp_path / "cache", repo="some-owner/column")
    with pytest.raises(UserError, match=r"a\.parquet: has no column 'text'; its columns: content"):
        source.shards("train")
    assert downloaded(tmp_path / "cache", repo="some-owner/column", text_column="content").shards("train")


def test_without_a_download_the_command_for_it_is_named(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        open_source(settings(revision="v 1"), tmp_path / "cache")
    assert f"nothing of {REPO} (v 1) is here" in str(raised.value)
    assert f"nanochat-pl download data=hub data.repo={REPO} 'data.revision=v 1'" in raised.value.fix
    assert hub.requests == []


def test_what_falls_short_of_the_plan_is_said_with_the_command(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    downloaded(tmp_path / "cache", 1)
    per_shard = len("".join(texts_of_shard(0))) / 4.8
    capsys.readouterr()
    open_source(settings(), tmp_path / "cache", tokens_needed=int(0.9 * per_shard))
    assert capsys.readouterr().out == ""
    open_source(settings(), tmp_path / "cache", tokens_needed=int(2.5 * per_shard))
    said = capsys.readouterr().out
    assert "1 of 4 training files" in said and "num_shards=3" in said and "epochs" in said
    open_source(settings(num_shards=2), tmp_path / "cache")
    assert "1 of 2 training files" in capsys.readouterr().out
    source = open_source(settings(download=True), tmp_path / "cache", tokens_needed=int(2.5 * per_shard))
    assert len(source.shards("train")) == 3
    assert texts_of(source, "train") == [text for n in range(3) for text in texts_of_shard(n)], "fetched when read"
    assert len(open_source(settings(num_shards=2), tmp_path / "cache").shards("train")) == 2
    texts_of(open_source(settings(num_shards=4, download=True), tmp_path / "cache", tokens_needed=1), "train")
    assert len(open_source(settings(), tmp_path / "cache").shards("train")) == 4


def test_a_training_that_goes_on_has_the_files_that_it_was_begun_with(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More had come, by advice of our own or by a better estimate, and the run was refused for other data."""
    cache, record = tmp_path / "cache", tmp_path / "data.json"
    downloaded(cache, 2)
    begun = open_source(settings(), cache)
    write_chosen(record, begun)
    downloaded(cache, 4)
    hub.add(REPO, {**FILES, "shard_00005.parquet": parquet(["val"])})
    HubFiles(settings(), cache, ask_hub=True, refresh=True)  # another file is the last one now
    capsys.readouterr()
    with pytest.raises(UserError, match=rf"is here[^$]*data\.revision={begun.manifest.commit}"):  # type: ignore[attr-defined]
        open_source(settings(), cache, chosen=read_chosen(record))
    for download in (True, False):
        again = open_source(settings(download=download), cache, 10**9, read_chosen(record))
        assert again.fingerprint == begun.fingerprint
        assert "2 more files are here" in capsys.readouterr().out
    path = again.manifest.at_hand(again.manifest.file("shard_00001.parquet"))  # type: ignore[attr-defined]
    path.unlink()
    lacking = open_source(settings(), cache, chosen=read_chosen(record))
    with pytest.raises(UserError, match=r"shard_00001\.parquet .*begun with it[^$]*num_shards=2"):
        lacking.shards("train")
    again = open_source(settings(download=True), cache, 10**9, read_chosen(record))
    assert again.fingerprint == begun.fingerprint
    record.write_text('{"data": {"commit": 1}}')
    with pytest.raises(UserError, match=r"data\.json: data\.commit"):
        read_chosen(record)
    record.write_text("[]")
    with pytest.raises(UserError, match=r"data\.json: must hold a JSON object, not list.\n.*resume=never"):
        read_chosen(record)


def test_a_mixture_goes_on_with_its_files(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("\n\n".join(f"text {n} " * 50 for n in range(99)))
    sources = {
        "web": WeightedSource(name="hub", repo=REPO, weight=1.0),
        "own": WeightedSource(name="local", path=str(tmp_path / "own.txt"), weight=1.0),
    }
    mixture = DataSettings(name="mixture", sources=dict(sources))
    downloaded(tmp_path / "cache", 1)
    begun = open_source(mixture, tmp_path / "cache")
    write_chosen(tmp_path / "data.json", begun)
    downloaded(tmp_path / "cache", 3)
    chosen = read_chosen(tmp_path / "data.json")
    assert {key: files.train for key, files in chosen.items()} == {"data.sources.web": ("shard_00000.parquet",)}
    assert open_source(mixture, tmp_path / "cache").fingerprint != begun.fingerprint
    assert open_source(mixture, tmp_path / "cache", chosen=chosen).fingerprint == begun.fingerprint


def test_a_download_at_the_start_is_enough_at_once(hub: HubServer, tmp_path: Path) -> None:
    """Before anything is here the size of its text is guessed; the second call took more files than the first."""
    seen = [
        (len(source.shards("train")), source.fingerprint)
        for source in (open_source(settings(download=True), tmp_path / "cache", 2500) for _ in range(2))
    ]
    assert seen == [seen[0]] * 2


def test_files_that_come_meanwhile_are_not_half_taken_in(hub: HubServer, tmp_path: Path) -> None:
    source = downloaded(tmp_path / "cache", 1)
    before = source.fingerprint
    downloaded(tmp_path / "cache", 3)
    assert (source.fingerprint, len(source.shards("train"))) == (before, 1)


def test_tokens_are_estimated_from_the_text_alone(hub: HubServer, tmp_path: Path) -> None:
    sink, texts = io.BytesIO(), [*texts_of_shard(0)]
    numbers = [[float(n)] * 500 for n in range(len(texts))]
    pq.write_table(pa.table({"text": texts, "vector": numbers}), sink, compression="none", use_dictionary=False)
    hub.add("some-owner/wide", {"a.parquet": sink.getvalue(), "b.parquet": sink.getvalue()})
    source = downloaded(tmp_path / "cache", 1, repo="some-owner/wide")
    assert source.tokens_here() == pytest.approx(len("".join(texts)) / 4.8, rel=0.2)


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/dev-tools/train-0.parquet", "train"),
        ("python-dev/part-0.parquet", None),
        ("test-suites/a.parquet", None),
        ("validation/train-0.parquet", "train"),
        ("default/partial-train/0000.parquet", "train"),
        ("default/Validation/0000.parquet", "val"),
        ("test/dev/0000.parquet", "val"),
        ("main/test-00000-of-00001.parquet", "test"),
        ("latest.parquet", None),
    ],
)
def test_which_split_a_path_names(path: str, split: str | None) -> None:
    """A folder of tools for developers was taken for validation."""
    assert split_in_name(path) == split


def test_fingerprints_are_those_of_the_contents(hub: HubServer, tmp_path: Path) -> None:
    """The same text on the disk has the same tokens in the cache."""
    source = downloaded(tmp_path / "cache")
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    for name, data in SHARDS.items():
        (tmp_path / ("val" if "4" in name else "train") / name).write_bytes(data)
    paths = {"path": str(tmp_path / "train"), "validation_path": str(tmp_path / "val")}
    local = open_source(DataSettings(name="local", **paths), tmp_path / "cache")  # type: ignore[arg-type]
    for split in ("train", "val"):
        here, there = (each.shards(split) for each in (source, local))  # type: ignore[arg-type]
        assert [shard.fingerprint for shard in here] == [shard.fingerprint for shard in there]
    assert list(pickle.loads(pickle.dumps(source.shards("val")[0])).documents()) == texts_of_shard(4)


def test_a_damaged_manifest_is_asked_for_again(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = open_manifest(REPO, "main", tmp_path / "cache")
    (path,) = (tmp_path / "cache").rglob("main.json")
    for damage in (path.read_text()[:-20], json.dumps({"repo": REPO}), "[]"):
        path.write_text(damage)
        with caplog.at_level(logging.WARNING):
            assert open_manifest(REPO, "main", tmp_path / "cache") == manifest
        assert "is damaged" in caplog.text


def test_two_downloads_at_once_lose_nothing(hub: HubServer, tmp_path: Path) -> None:
    one, other = (HubFiles(settings(), tmp_path / "cache", ask_hub=True) for _ in range(2))
    one.fetch(2)
    fetch_files(other.manifest, [other.manifest.file("shard_00003.parquet")], tmp_path / "cache")
    manifest = known_manifest(REPO, "main", tmp_path / "cache")
    assert manifest is not None and [file.rows for file in manifest.files][2:] == [120, 120, None, 120, 120]


def test_the_real_data_sets_of_a_hub(hub: HubServer, shared: Path, tmp_path: Path) -> None:
    """Text shards and the splits of question sets, as they lie on the hub."""
    shards = {path.name: path.read_bytes() for path in sorted((shared / "data" / "text").glob("shard_*.parquet"))}
    hub.add("real/text", shards)
    source = downloaded(tmp_path / "cache", 9, repo="real/text")
    assert [shard.name for shard in source.shards("val")] == ["shard_00005.parquet"]
    assert [shard.name for shard in source.shards("train")] == [f"shard_{n:05d}.parquet" for n in range(5)]
    folder = shared / "data" / "hub" / "datasets" / "allenai" / "ai2_arc"
    hub.add("allenai/ai2_arc", {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.parquet")})
    manifest = open_manifest("allenai/ai2_arc", "main", tmp_path / "cache")
    files = manifest.matching("ARC-Easy/*")
    paths = fetch_files(manifest, files, tmp_path / "cache").paths
    assert [pq.read_table(path).num_rows for path in paths] == [2376, 2251, 570]
