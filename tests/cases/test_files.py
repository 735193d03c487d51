"""Kinds of faults in files of text: what is left out, splits by name, separators, types, encodings."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_json
from nanochat_pl.data.files.folder import find_files
from nanochat_pl.data.files.formats import check_file, documents_of
from nanochat_pl.data.files.split_names import configurations
from nanochat_pl.data.files.txt import txt_documents
from nanochat_pl.data.sources.base import SourceSettings
from nanochat_pl.data.sources.local import LocalFiles
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.published.conversations import ConversationSet, ConversationSettings


def local(path: Path, cache: Path, **settings: Any) -> LocalFiles:
    return LocalFiles(SourceSettings("local", path=str(path), **settings), cache)


def texts(source: LocalFiles, split: Any) -> list[str]:
    return [text for shard in source.shards(split) for text in shard.documents()]


def table(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": values}), path)
    return path


def test_05_text_files_are_cut_at_separators(shared: Path) -> None:
    documents = list(documents_of(shared / "cases/05_endoftext_separator/a.txt", "text", 8_000))
    assert len(documents) == 200 and all(text.startswith(f"Document {n}. ") for n, text in enumerate(documents))
    assert not any("endoftext" in text for text in documents)


@pytest.mark.parametrize(
    "separator", ["<|endoftext|>", "\n<|end_of_text|>\n", "\n</s>\n", "\n<eos>\n", "\n\n<|endoftext|>\n\n"]
)
@pytest.mark.parametrize("length", [5, 70, 65_500, 65_536])
def test_other_separators_wherever_a_block_ends(separator: str, length: int, tmp_path: Path) -> None:
    stories = [f"{n}" + "x" * length for n in range(5)]
    (tmp_path / "a.txt").write_text(separator.join(stories), encoding="utf-8")
    assert list(txt_documents(tmp_path / "a.txt", 100_000)) == stories


def test_what_looks_like_a_separator_in_a_line_stays(tmp_path: Path) -> None:
    text = "an <s>old</s> word\n\nand </s> another"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert list(txt_documents(tmp_path / "a.txt", 8_000)) == [text]


def test_06_files_that_are_left_out_are_counted(shared: Path, tmp_path: Path) -> None:
    source = local(shared / "cases/06_unread_files_in_folder/mixed", tmp_path)
    said = "5 files left out (.csv, .json, .jsonl.bz2, .md, .ndjson), the first c.jsonl.bz2"
    assert said in source.describe() and source.remarks() == [said]
    said = "1 file left out (.json.gz), the first c4-train.00000-of-01024.json.gz"
    assert local(shared / "cases/06_unread_files_in_folder/c4dir", tmp_path).remarks() == [said]


def test_other_files_that_are_left_out(tmp_path: Path) -> None:
    (folder := tmp_path / "set").mkdir()
    (folder / "a.jsonl").write_text('[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]\n' * 3)
    (folder / "b.jsonl").write_text('[{"role":"user","content":"c"},{"role":"assistant","content":"d"}]\n' * 3)
    for name in ("notes.md", ".hidden.jsonl", ".git", "table.CSV"):
        (folder / name).write_text("x")
    (folder / "gone.jsonl").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.jsonl")
    settings = ConversationSettings(path=str(folder))
    own = ConversationSet("own", settings, "train", TaskContext(tmp_path / "cache"))
    (line,) = own.losses()
    assert line.startswith(
        "5 files left out (.CSV, .md, a FIFO (a named pipe), a link to something that is not there, hidden)"
    )
    assert f"own: {line}." in own.describe()


def test_links_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "set/deep").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("set/a.txt", "set/deep/b.txt", "other/c.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "set/deep/loop").symlink_to("..")
    (tmp_path / "set/deep/loop2").symlink_to("../../set")
    (tmp_path / "set/there").symlink_to("../other")
    (tmp_path / "set/again.txt").symlink_to("a.txt")
    for given in ("set", "set/**", "set/**/*.txt", "**/*.txt"):
        found = find_files("data.path", str(tmp_path / given))
        assert sorted(path.resolve().name for path in found.files.values()) == ["a.txt", "b.txt", "c.txt"], given
    assert find_files("data.path", str(tmp_path / "set")).left_out == {"again.txt": "a link to one that is read"}
    assert list(find_files("data.path", str(tmp_path / "set/*/*.txt")).files) == ["deep/b.txt", "there/c.txt"]


def test_folders_that_vanish_while_they_are_listed_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of processes do under /proc: it was a traceback."""
    (tmp_path / "a.txt").write_text("text")
    for name in ("listed", "ends", "refused"):
        (tmp_path / name).mkdir()
    errors: dict[str, OSError] = {"listed": FileNotFoundError(2, "is no more"), "ends": ProcessLookupError(3, "ended")}
    stat = Path.stat

    def vanishing(path: Path, **given: Any) -> Any:
        if path.name in errors:
            raise errors[path.name]
        return stat(path, **given)

    monkeypatch.setattr(Path, "stat", vanishing)
    assert list(find_files("data.path", str(tmp_path)).files) == ["a.txt"]
    errors["refused"] = PermissionError(13, "Permission denied")
    with pytest.raises(UserError, match="refused: cannot be looked at: Permission denied"):
        find_files("data.path", str(tmp_path))


@pytest.mark.parametrize("given", ["", "*.txt", "**/*.txt"])
def test_links_that_lead_nowhere_leave_the_other_files_readable(given: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "there.txt").symlink_to("back.txt")
    (tmp_path / "back.txt").symlink_to("there.txt")
    found = find_files("data.path", str(tmp_path / given))
    assert list(found.files) == ["a.txt"]
    assert found.remarks()[0].startswith("3 files left out (unreadable (Too many levels of symbolic links)), the first")
    with pytest.raises(UserError, match=r"data\.path='.*self\.txt': cannot be looked at: Too many levels"):
        find_files("data.path", str(tmp_path / "self.txt"))


def test_08_splits_by_name_are_the_same_everywhere(shared: Path, tmp_path: Path) -> None:
    source = local(shared / "cases/08_local_split_names/wikitext", tmp_path)
    assert [shard.name for shard in source.shards("train")] == ["train-00000-of-00001.parquet"]
    assert [shard.name for shard in source.shards("val")] == ["validation-00000-of-00001.parquet"]
    assert "validated on validation-00000-of-00001.parquet, by name" in source.describe()
    assert source.remarks() == [
        "test-00000-of-00001.parquet is not used: by name for tests, and there is a validation file"
    ]


def test_splits_of_other_names(tmp_path: Path) -> None:
    for folder, names in {
        "a": ("train.txt", "dev.txt"),
        "b": ("train/0.txt", "test/0.txt"),
        "c": ("x.txt", "my-eval.txt"),
    }.items():
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text(f"what {folder}/{name} says")
        source = local(tmp_path / folder, tmp_path / "cache")
        assert texts(source, "train") == [f"what {folder}/{names[0]} says"]
        assert texts(source, "val") == [f"what {folder}/{names[1]} says"]
    (tmp_path / "a/dev.txt").write_text("what a/train.txt says")
    with pytest.raises(UserError, match=r"dev\.txt: is validated on, by its name, and trained on"):
        local(tmp_path / "a", tmp_path / "cache")


def test_configurations_are_named(tmp_path: Path) -> None:
    for name in ("en/train-0.parquet", "de/train-0.parquet", "de/test-0.parquet"):
        table(tmp_path / "set" / name, [f"{name} {n}" for n in range(9)])
    (remark,) = local(tmp_path / "set", tmp_path).remarks()
    assert remark.startswith("trained on are the files of 2 folders (de, en), which may be configurations")
    assert f"data.path={tmp_path / 'set'}/de takes one" in remark
    assert not local(tmp_path / "set/de", tmp_path).remarks(), "the advice is followed and holds"
    assert configurations(["train/a.txt", "train/b.txt"]) == []
    assert configurations(["data/train-0.parquet", "data/train-1.parquet"]) == []


def test_15_a_column_that_is_there_twice(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has the column 'text' twice"):
        check_file(shared / "cases/15_duplicate_parquet_column/a.parquet", "text")
    others = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], names=["text", "n", "n"])
    pq.write_table(others, tmp_path / "b.parquet")
    assert list(documents_of(tmp_path / "b.parquet", "text", 99)) == ["a"], (
        "those that are not read may be what they are"
    )
    thrice = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["text"] * 3)
    pq.write_table(thrice, tmp_path / "c.parquet")
    with pytest.raises(UserError, match="has the column 'text' 3 times"):
        check_file(tmp_path / "c.parquet", "text")
    (tmp_path / "d.jsonl").write_text('{"text": "a", "text": "b"}\n')
    with pytest.raises(UserError, match=r"d\.jsonl:1: is not valid JSON \(the key 'text' stands twice"):
        check_file(tmp_path / "d.jsonl", "text")


@pytest.mark.parametrize("name", ["a", "view"])
def test_16_string_views_are_text(name: str, shared: Path) -> None:
    path = shared / f"cases/16_string_view_parquet/{name}.parquet"
    assert check_file(path, "text") and all(isinstance(text, str) for text in documents_of(path, "text", 99))


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["é", None, " "], pa.large_string()),
        pa.array(["é", None, " "]).dictionary_encode(),
        pa.array(["é", None, " "], pa.string_view()),
        pa.array(["é".encode(), None, b" "], pa.binary()),
        pa.array(["é".encode(), None, b" "], pa.large_binary()),
    ],
)
def test_other_types_of_text(values: Any, tmp_path: Path) -> None:
    assert list(documents_of(table(tmp_path / "a.parquet", values), "text", 99)) == ["é", "", ""]


def test_bytes_that_are_no_text_are_named_with_their_row(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", pa.array([b"a", b"\xff"], pa.binary()))
    with pytest.raises(UserError, match="row group 0: the 'text' of its row 1 is not UTF-8"):
        list(documents_of(path, "text", 99))
    for kind in (pa.int64(), pa.list_(pa.string())):
        with pytest.raises(UserError, match="and not text"):
            check_file(table(tmp_path / "b.parquet", pa.array([None], kind)), "text")


def refused(path: Path) -> UserError:
    with pytest.raises(UserError) as error:
        list(documents_of(path, "text", 8_000))
    return error.value


def command_of(fix: str) -> str:
    """The shell's part of a fix."""
    return fix.partition("Convert it: ")[2].partition(". Which ENCODING")[0]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_19_wide_encodings_are_named_and_the_advice_works(encoding: str, tmp_path: Path) -> None:
    text = "Ein Satz mit Umlauten: äöü. Und noch einer.\n" * 400
    for name in ("a b.txt", "c.jsonl"):
        path = tmp_path / name
        path.write_bytes((text if name.endswith("txt") else '{"text": "äöü und mehr"}\n').encode(encoding))
        error = refused(path)
        assert re.search(r"is not UTF-8: it is UTF-(16|32)(LE|BE)?, by its", str(error))
        if shutil.which("iconv"):
            subprocess.run(["sh", "-c", command_of(error.fix)], check=True)
            assert "äöü" in next(documents_of(path, "text", 8_000))


def test_19_the_files_of_the_case(shared: Path, tmp_path: Path) -> None:
    for name in ("utf16", "gbk"):
        shutil.copy(shared / f"cases/19_iconv_latin1_advice/{name}.txt", tmp_path)
    assert "is not UTF-8: it is UTF-16, by its byte order mark." in str(refused(tmp_path / "utf16.txt"))
    error = refused(tmp_path / "gbk.txt")
    assert "latin1" not in error.fix and "iconv -f ENCODING" in error.fix and "its author knows" in error.fix
    if shutil.which("iconv"):
        subprocess.run(["sh", "-c", command_of(error.fix).replace("ENCODING", "GB18030")], check=True)
        assert re.match(r"[\u4e00-\u9fff]{10}", next(documents_of(tmp_path / "gbk.txt", "text", 8_000)))


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    listening = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    try:
        os.chdir(tmp_path)  # the name of a socket is short
        listening.bind("b.txt")
    finally:
        os.chdir(here)
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    (tmp_path / "d.txt").mkdir()
    for name, kind in (("a.txt", "FIFO"), ("b.txt", "socket"), ("c.txt", "character device")):
        with pytest.raises(UserError, match=rf"{name}: is a {kind}.*not a regular file"):
            find_files("data.path", str(tmp_path / name))
        with pytest.raises(UserError, match=rf"{name}: is a {kind}"):
            list(documents_of(tmp_path / name, "text", 99))
        with pytest.raises(UserError, match=rf"{name}: is a {kind}"):
            read_json(tmp_path / name)
    with pytest.raises(UserError, match="is a folder"):
        read_json(tmp_path / "d.txt")
    listening.close()
