"""Tasks of tables: where their files are looked for, in which order rows come, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build
from nanochat_pl.data.hub.download import fetch_files
from nanochat_pl.data.hub.manifest import open_manifest
from nanochat_pl.tasks.base import Split
from nanochat_pl.tasks.published.base import TableTask
from nanochat_pl.tasks.published.gsm8k import GSM8KSettings
from nanochat_pl.tasks.published.mmlu import MMLUSettings
from tests.helpers.hub_server import serving_this_process
from tests.helpers.task_tables import opened, problem, write_table

REPO = "openai/gsm8k"


def numbers(task: TableTask) -> list[int]:
    """Which problems a task has, in its order."""
    return [int(task[i]["messages"][0]["content"].split()[-1].rstrip("?")) for i in range(len(task))]


def mirror(folder: Path, train: range = range(20), test: range = range(100, 110)) -> Path:
    table = folder / "datasets" / REPO / "main"
    write_table(table / "train-00000-of-00001.parquet", [problem(n) for n in train])
    write_table(table / "test-00000-of-00001.parquet", [problem(n) for n in test])
    return folder


def test_each_part_has_its_rows_in_the_order_that_published_figures_have(tmp_path: Path) -> None:
    hub = mirror(tmp_path / "hub")
    train = numbers(opened("gsm8k", "train", tmp_path, hub))
    assert train == np.random.default_rng(42).permutation(20).tolist() and sorted(train) == list(range(20))
    assert sorted(numbers(opened("gsm8k", "test", tmp_path, hub))) == list(range(100, 110))
    assert numbers(opened("gsm8k", "train", tmp_path, hub, order_seed=None)) == list(range(20))
    assert numbers(opened("gsm8k", "train", tmp_path, hub, start=3, size=4)) == train[3:7]
    assert numbers(opened("gsm8k", "train", tmp_path, hub, start=18, size=9)) == train[18:], "none comes twice"
    assert len(opened("gsm8k", "test", tmp_path, hub, test_size=3)) == 3
    assert numbers(opened("gsm8k", "train", tmp_path, hub, start=1, step=6)) == train[1::6]
    assert numbers(opened("gsm8k", "train", tmp_path, hub, step=6, size=2)) == train[::6][:2]
    test = numbers(opened("gsm8k", "test", tmp_path, hub))
    halves = [numbers(opened("gsm8k", "test", tmp_path, hub, test_step=2, test_start=n)) for n in (0, 1)]
    assert halves == [test[::2], test[1::2]]
    with pytest.raises(UserError, match=r"mixture.tasks.gsm8k.test_start=10: nothing of its 10 rows is left"):
        opened("gsm8k", "test", tmp_path, hub, test_start=10)
    with pytest.raises(UserError, match=r"mixture.tasks.gsm8k.start=20: nothing of its 20 rows is left"):
        opened("gsm8k", "train", tmp_path, hub, start=20)


def test_the_order_of_numpy_s_generator_is_the_one_that_figures_were_published_with() -> None:
    assert np.random.default_rng(42).permutation(10).tolist() == [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]


def test_given_files_stand_before_the_mirror(tmp_path: Path) -> None:
    hub = mirror(tmp_path / "hub")
    lines = [json.dumps(problem(n) | {"more": None}) for n in (7, 8)]
    (tmp_path / "own.jsonl").write_text("\ufeff" + "\n".join([*lines, "", ""]), encoding="utf-8")
    for number, rows in enumerate(([1, 2], [3])):
        write_table(tmp_path / f"own/part{number}.parquet", [problem(n) for n in rows])
    own: dict[str, Any] = {"path": tmp_path / "own", "test_path": tmp_path / "own.jsonl", "order_seed": None}
    train, test = opened("gsm8k", "train", tmp_path, hub, **own), opened("gsm8k", "test", tmp_path, hub, **own)
    assert numbers(train) == [1, 2, 3] and numbers(test) == [7, 8]
    assert train.origin(2) == "part1.parquet, row 0"
    only_train = opened("gsm8k", "test", tmp_path, hub, path=tmp_path / "own")
    assert sorted(numbers(only_train)) == list(range(100, 110)), "each key stands for its own part"


def test_what_is_trained_on_is_not_held_out(tmp_path: Path) -> None:
    one = write_table(tmp_path / "a.parquet", [problem(1)])
    shutil.copy(one, tmp_path / "b.parquet")
    splits: tuple[Split, Split] = ("train", "test")
    for split in splits:
        with pytest.raises(UserError, match=r"\.parquet and .*\.parquet have the same contents"):
            opened("gsm8k", split, tmp_path, path=one, test_path=tmp_path / "b.parquet")
    with pytest.raises(UserError, match="test_split='dev': is trained on, as train_split says"):
        build(MMLUSettings, {"train_split": "dev", "test_split": "dev"})


SPLITS: tuple[Split, Split] = ("train", "test")


def parts(cache: Path, hub: Path | None = None, **settings: Any) -> list[list[int]]:
    """What is trained on and what is held out, sorted."""
    return [sorted(numbers(opened("gsm8k", split, cache, hub, **settings))) for split in SPLITS]


@pytest.mark.parametrize("files", ["", "/*.parquet"])
def test_a_folder_with_both_parts_is_told_apart_by_the_names_of_its_files(files: str, tmp_path: Path) -> None:
    folder = mirror(tmp_path) / "datasets" / REPO / "main"
    path = f"{folder}{files}"
    both = [list(range(20)), list(range(100, 110))]
    assert parts(tmp_path, path=path) == both, "and no mirror is needed"
    assert parts(tmp_path, path=path, test_path=path) == both
    assert parts(tmp_path, tmp_path, test_path=path) == both, "to train on there is the data set's"
    write_table(folder / "more.parquet", [problem(50)])
    write_table(folder / "validation-00000-of-00001.parquet", [problem(60)])
    assert parts(tmp_path, path=path) == [[*both[0], 50], both[1]], "a third part is for neither"
    own = write_table(tmp_path / "own.parquet", [problem(7)])
    assert parts(tmp_path, path=path, test_path=own) == [[*both[0], 50], [7]]
    (folder / "test-00000-of-00001.parquet").unlink()
    assert parts(tmp_path, path=path) == [[*both[0], 50], [60]], "without a test part validation is held out"


@pytest.mark.parametrize(
    ("files", "settings", "train", "test"),
    [
        (["auxiliary_train-0", "dev-0", "validation-0", "test-0"], {}, [0], [3]),
        (["auxiliary_train-0", "dev-0", "validation-0", "test-0"], {"train_split": "dev"}, [1], [3]),
        (["a-0", "dev-0", "validation-0"], {"train_split": "dev", "test_split": "validation"}, [0, 1], [2]),
        (["train/0", "test/0"], {}, [0], [1]),
        (["train", "valid"], {}, [0], [1]),
        (["validation", "test"], {}, [0], [1]),
    ],
)
def test_the_splits_of_the_settings_are_looked_for_first(
    files: list[str], settings: dict[str, str], train: list[int], test: list[int], tmp_path: Path
) -> None:
    for number, name in enumerate(files):
        row = {"question": str(number), "subject": "", "choices": ["a", "b"], "answer": 0}
        write_table(tmp_path / "own" / f"{name}.parquet", [row])
    for split, wanted in zip(SPLITS, (train, test), strict=True):
        task = opened("mmlu", split, tmp_path, path=tmp_path / "own", **settings)
        assert sorted(int(task.row(index)["question"]) for index in range(len(task))) == wanted


def test_one_key_does_not_give_the_other_part_s_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out file of the data set was trained on where path named it, and the other way round."""
    hub, own = mirror(tmp_path / "hub"), tmp_path / "own"
    table = hub / "datasets" / REPO / "main"
    shutil.copytree(table, own)
    train, test = (f"{own}/{split}-00000-of-00001.parquet" for split in SPLITS)
    for key, file in (("path", test), ("test_path", train)):
        for split in SPLITS:
            with pytest.raises(UserError, match=rf"gsm8k: \S+ and \S+ have the same contents.*\nSay .*gsm8k\.{key}"):
                opened("gsm8k", split, tmp_path, hub, **{key: file})
    assert parts(tmp_path, hub, path=train) == parts(tmp_path, hub, test_path=test) == parts(tmp_path, hub)
    with pytest.raises(UserError, match=r"hub/\S+/train-\S+ and \S+own/train-\S+ have the same"):
        opened("gsm8k", "test", tmp_path, hub, test_path=train)
    held_out = table / "test-00000-of-00001.parquet"
    with pytest.raises(UserError, match=rf"gsm8k: {held_out} is trained on and held out\.\n"):
        opened("gsm8k", "train", tmp_path, hub, path=held_out)
    cache = tmp_path / "cache"
    with serving_this_process(tmp_path / "home", monkeypatch) as server:
        server.add(REPO, {f"main/{path.name}": path.read_bytes() for path in table.iterdir()})
        open_manifest(REPO, "main", cache)
    with pytest.raises(UserError, match=r"gsm8k: \S+ and main/test-\S+ have the same contents"):
        opened("gsm8k", "train", cache, path=test)  # the list of the hub's files tells, before any is downloaded
    assert numbers(opened("gsm8k", "train", tmp_path / "empty", path=test)), "nothing is known of the data set"


@pytest.mark.parametrize("given", [{}, {"path": "a"}, {"test_path": "a"}])
def test_a_split_is_not_both_parts(given: dict[str, str]) -> None:
    with pytest.raises(UserError, match="test_split='train': is trained on, as train_split says"):
        build(GSM8KSettings, {"test_split": "train", **given})


def test_a_fingerprint_is_of_contents_and_of_what_is_taken(tmp_path: Path) -> None:
    hub, moved, other = mirror(tmp_path / "hub"), mirror(tmp_path / "moved"), mirror(tmp_path / "other", range(1, 21))
    first = opened("gsm8k", "train", tmp_path, hub).fingerprint
    same = opened("gsm8k", "train", tmp_path / "b", moved, repeat=3, test_size=4)
    assert same.fingerprint == first
    path = moved / "datasets" / REPO / "main" / "train-00000-of-00001.parquet"
    assert opened("gsm8k", "train", tmp_path, path=path).fingerprint == first, "wherever they lie"
    changes: list[dict[str, Any]] = [{"start": 1}, {"size": 19}, {"order_seed": 1}, {"recompute": True}]
    others = [opened("gsm8k", "train", tmp_path, hub, **change) for change in changes]
    others += [opened("gsm8k", "train", tmp_path, other), opened("gsm8k", "test", tmp_path, hub)]
    assert len({first, *(task.fingerprint for task in others)}) == 7


def test_a_mirror_that_has_some_of_a_split_s_files(tmp_path: Path) -> None:
    table = tmp_path / "hub/datasets" / REPO / "main"
    for number in (0, 2):
        write_table(table / f"train-0000{number}-of-00003.parquet", [problem(number)])
    with pytest.raises(UserError, match=r"gsm8k: 2 of the 3 files main/train… of openai/gsm8k are here"):
        opened("gsm8k", "train", tmp_path, tmp_path / "hub")
    write_table(table / "train-00001-of-00003.parquet", [problem(1)])
    assert numbers(opened("gsm8k", "train", tmp_path, tmp_path / "hub", order_seed=None)) == [0, 1, 2]


def test_missing_files_are_said_with_the_command_that_fetches_them(tmp_path: Path) -> None:
    said = r"mixture.tasks.gsm8k: nothing of openai/gsm8k \(main\) is here.\nFetch it: nanochat-pl download task=gsm8k "
    with pytest.raises(UserError, match=said + r"paths.cache=\S+$"):
        opened("gsm8k", "train", tmp_path)
    for place, why in (("nowhere", "is no mirror: it has no folder datasets"), ("hub", "does not have it")):
        (tmp_path / "hub/datasets").mkdir(parents=True, exist_ok=True)
        with pytest.raises(UserError, match=rf"is here, and paths\.hub=\S+{place} {why}\."):
            opened("gsm8k", "train", tmp_path, tmp_path / place)
    other: dict[str, Any] = {"repo": "some/other", "revision": "v2", "config": "socratic"}
    with pytest.raises(UserError, match=r"task=gsm8k repo=some/other revision=v2 config=socratic paths.cache=\S+$"):
        opened("gsm8k", "train", tmp_path, **other)
    hub = mirror(tmp_path / "hub")
    with pytest.raises(UserError, match=r"gsm8k.config='socratic': openai/gsm8k has no such files; valid: main$"):
        opened("gsm8k", "train", tmp_path, hub, config="socratic")
    with pytest.raises(UserError, match=r"gsm8k.test_split='tests': .* no such files; did you mean test\?"):
        opened("gsm8k", "test", tmp_path, hub, test_split="tests")
    write_table(tmp_path / "flat/datasets" / REPO / "train.parquet", [problem(1)])
    with pytest.raises(UserError, match=r"gsm8k.config='main': openai/gsm8k has no such files; valid: train.parquet"):
        opened("gsm8k", "train", tmp_path, tmp_path / "flat")
    with pytest.raises(UserError, match=r"mixture.tasks.gsm8k.test_path='nowhere': there is no such file"):
        opened("gsm8k", "test", tmp_path, test_path="nowhere")


def as_bytes(*rows: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file.getvalue()


def test_downloaded_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"main/train-0000{n}-of-00002.parquet": as_bytes(problem(n)) for n in range(2)}
    files |= {"main/test-00000-of-00001.parquet": as_bytes(problem(100)), "README.md": b"words"}
    cache = tmp_path / "cache"
    with serving_this_process(tmp_path / "home", monkeypatch) as server:
        server.add(REPO, files)
        manifest = open_manifest(REPO, "main", cache)
        fetch_files(manifest, [manifest.file("main/train-00000-of-00002.parquet")], cache)
        with pytest.raises(
            UserError, match=r"not here: 1, the first is main/train-00001-of-00002.parquet[^$]*task=gsm8k"
        ):
            opened("gsm8k", "train", cache)
        fetched = fetch_files(manifest, manifest.matching(GSM8KSettings().files), cache)
    assert numbers(opened("gsm8k", "train", cache, order_seed=None)) == [0, 1]
    assert numbers(opened("gsm8k", "test", cache)) == [100]
    hub = mirror(tmp_path / "hub", train=range(5))
    assert len(opened("gsm8k", "train", cache, hub)) == 5, "the mirror is looked at first"
    assert len(opened("gsm8k", "train", cache, hub, revision="main")) == 2, "which has no revisions"
    with pytest.raises(UserError, match=r"config='socratic': openai/gsm8k has no such files; valid: main"):
        opened("gsm8k", "train", cache, config="socratic")
    damaged = next(path for path in fetched.paths if path.name == "test-00000-of-00001.parquet").resolve()
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.unlink()
    damaged.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"is damaged.\nIt is not what openai/gsm8k has. .*download task=gsm8k"):
        opened("gsm8k", "test", cache)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no rows"),
        ('{"question": "a"}\n', r":1: has no column 'answer'; its columns: question"),
        ('{"question": "a", "answer": "#### 1"}\n{"quest', ":2: is not valid JSON"),
        ("[1]\n", ":1: is not a JSON object"),
    ],
)
def test_lines_that_are_no_rows(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"own\.jsonl{said}" if said[0] == ":" else rf"own\.jsonl: {said}"):
        opened("gsm8k", "train", tmp_path, path=path)


def test_tables_that_are_none(tmp_path: Path) -> None:
    path = write_table(tmp_path / "own.parquet", [{"question": "a", "text": "b"}])
    with pytest.raises(UserError, match=r"own.parquet: has no column 'answer'; its columns: question, text"):
        opened("gsm8k", "train", tmp_path, path=path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"own.parquet: is no whole parquet file"):
        opened("gsm8k", "train", tmp_path, path=path)
    path = write_table(tmp_path / "no.parquet", [problem(1), problem(2) | {"question": None}])
    with pytest.raises(UserError, match=r"mixture.tasks.gsm8k: no.parquet, row 1: question is NoneType, not text"):
        numbers(opened("gsm8k", "train", tmp_path, path=path))


def test_a_text_that_is_not_utf_8(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"question": texts, "answer": ["#### 1"] * 2}), tmp_path / "own.parquet")
    task = opened("gsm8k", "train", tmp_path, path=tmp_path / "own.parquet", order_seed=None)
    assert task[0]["messages"][0]["content"] == "a"
    with pytest.raises(UserError, match=r"own.parquet, row 1: is not UTF-8"):
        task[1]


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("gsm8k", problem(1) | {"question": "a \ud800"}, "question"),
        ("mmlu", {"question": "a", "subject": "b", "choices": ["\udc00", "c"], "answer": 0}, "choices"),
        (
            "arc_easy",
            {"question": "a\ud83d", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
            "qu",
        ),
    ],
)
def test_half_of_a_surrogate_pair(name: str, row: dict[str, Any], said: str, tmp_path: Path) -> None:
    """It went through a whole measurement and ended it with a traceback."""
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"tasks.{name}: own.jsonl, row 0: {said}.* holds half of a surrogate pair"):
        opened(name, "test", tmp_path, test_path=path)[0]


@pytest.mark.parametrize("key", ["repo", "config", "train_split", "test_split"])
def test_names_stay_names(key: str) -> None:
    for value in ("", "../..", "a/../b", "*"):
        with pytest.raises(UserError, match=f"{key}="):
            build(GSM8KSettings, {key: value})
