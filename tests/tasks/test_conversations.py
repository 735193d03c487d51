"""Sets of conversations in a mixture: which are trained on, which are held out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build, to_plain
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.mixture import Mixture, build_mixture, build_tasks, only_judged
from nanochat_pl.tasks.published.conversations import ConversationSet, ConversationSettings
from nanochat_pl.tasks.settings import MixtureSettings, MixtureTasks
from tests.helpers.hub_server import serving_this_process


def talk(n: object) -> str:
    return json.dumps([{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": str(n)}])


def write(path: Path, *numbers: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(talk(n) + "\n" for n in numbers), encoding="utf-8")
    return path


def opened(cache: Path, split: Any = "train", max_bad: float = 0.01, **settings: Any) -> ConversationSet:
    context = TaskContext(cache, max_bad)
    return ConversationSet("own", build(ConversationSettings, to_plain_text(settings)), split, context)


def to_plain_text(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}


def answers(conversations: ConversationSet) -> list[str]:
    return [conversations[i]["messages"][1]["content"] for i in range(len(conversations))]


def test_one_file_is_split_by_a_hash_and_copies_stay_together(tmp_path: Path) -> None:
    path = write(tmp_path / "train_only.jsonl", *range(400), *range(400))
    train, test = (answers(opened(tmp_path, split, path=path)) for split in ("train", "test"))
    assert len(train) + len(test) == 800 and 20 <= len(test) <= 80
    assert not set(train) & set(test) and sorted({*train, *test}, key=int) == [str(n) for n in range(400)]
    more = write(tmp_path / "more.jsonl", *range(500))
    assert set(answers(opened(tmp_path, "test", path=more))) >= set(test), "new rows move no old one"
    assert " of 800 held out, chosen by a hash of each" in opened(tmp_path, path=path).describe()[0]


def test_of_a_handful_one_is_held_out_and_one_is_kept(tmp_path: Path) -> None:
    for n in range(5):
        path = write(tmp_path / f"{n}.jsonl", f"a{n}", f"b{n}")
        assert len(opened(tmp_path, path=path)) == len(opened(tmp_path, "test", path=path)) == 1
    with pytest.raises(UserError, match="different conversations: 1"):
        opened(tmp_path, path=write(tmp_path / "same.jsonl", 1, 1, 1))


def test_files_are_held_out_by_their_names(tmp_path: Path) -> None:
    write(tmp_path / "set/train-00000.jsonl", 1, 2)
    write(tmp_path / "set/train-00001.jsonl", 3)
    write(tmp_path / "set/test-00000.jsonl", 4)
    train = opened(tmp_path, path=tmp_path / "set")
    assert answers(train) == ["1", "2", "3"] and train.origin(2) == ("train-00001.jsonl", 1)
    assert answers(opened(tmp_path, "test", path=tmp_path / "set")) == ["4"]
    write(tmp_path / "set/validation-00000.jsonl", 5, 6)
    assert answers(opened(tmp_path, "test", path=tmp_path / "set")) == ["5", "6"], "tests are not looked at"
    named = {"path": write(tmp_path / "a.jsonl", 1, 2), "test_path": write(tmp_path / "b.jsonl", 3)}
    assert answers(opened(tmp_path, **named)) == ["1", "2"] and answers(opened(tmp_path, "test", **named)) == ["3"]
    with pytest.raises(UserError, match=r"test_path=.*is under mixture.tasks.conversations.own.path too"):
        opened(tmp_path, path=tmp_path / "a.jsonl", test_path=tmp_path / "*.jsonl")


def test_what_one_set_holds_out_no_other_trains_on(tmp_path: Path) -> None:
    """Only paths were compared, and those of one set: copies and other sets took the held-out conversations."""

    def mixed(**sets: dict[str, Any]) -> dict[str, ConversationSet]:
        chosen = {name: to_plain_text(keys) for name, keys in sets.items()}
        return build_tasks(build(MixtureTasks, {"conversations": chosen}), "train", TaskContext(tmp_path))  # type: ignore[return-value]

    one, other = write(tmp_path / "one.jsonl", *range(40)), write(tmp_path / "d/other.jsonl", *reversed(range(40)))
    none = write(tmp_path / "none/a.jsonl", *range(90, 95)).parent
    for name in ("train", "test"):
        (none / f"{name}-0.jsonl").write_text("", encoding="utf-8")
    for sets in (
        {"a": {"path": one, "test_path": other}},
        {"a": {"path": one}, "b": {"path": other, "test_fraction": 0.3}},
        {"a": {"path": none / "a.jsonl", "test_path": one}, "b": {"path": other}},
    ):
        with pytest.raises(
            UserError, match=r"(one|other)\.jsonl of .*\) has the same conversations as .*held out of one"
        ):
            mixed(**sets)
    assert len(mixed(a={"path": one}, b={"path": other, "repeat": 2})["a"]) < 40, "both are split by the same rule"
    both = mixed(a={"path": tmp_path / "**/o*.jsonl"})["a"]
    assert "a: one.jsonl is a copy of d/other.jsonl: trained on twice" in both.describe()
    assert mixed(a={"path": none}), "files without conversations share none"


def test_slices_go_over_all_files(tmp_path: Path) -> None:
    for n in range(3):
        write(tmp_path / f"set/{n}.jsonl", *range(10 * n, 10 * n + 10))
    keys = {"path": tmp_path / "set", "test_path": write(tmp_path / "t.jsonl", *range(100, 109))}
    assert answers(opened(tmp_path, start=8, size=14, **keys)) == [str(n) for n in range(8, 22)]
    assert answers(opened(tmp_path, start=25, **keys)) == [str(n) for n in range(25, 30)]
    assert len(opened(tmp_path, "test", test_size=4, start=8, **keys)) == 4
    assert answers(opened(tmp_path, start=8, step=3, **keys)) == [str(n) for n in range(8, 30, 3)]
    assert answers(opened(tmp_path, start=1, step=4, size=3, **keys)) == ["1", "5", "9"]
    assert answers(opened(tmp_path, step=15, **keys)) == ["0", "15"], "the second file alone has none"
    assert answers(opened(tmp_path, "test", test_start=2, test_step=3, **keys)) == ["102", "105", "108"]
    assert opened(tmp_path, step=2, **keys).fingerprint != opened(tmp_path, step=2, start=1, **keys).fingerprint
    one = opened(tmp_path, start=8, size=14, **keys).fingerprint
    assert len({one, opened(tmp_path, start=9, size=14, **keys).fingerprint}) == 2
    assert opened(tmp_path / "elsewhere", start=8, size=14, **keys).fingerprint == one
    with pytest.raises(UserError, match="nothing of its 39 rows is left for the train part"):
        opened(tmp_path, start=30, **keys)


def test_bad_rows_are_put_up_with_to_a_share(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *range(99))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"messages": []}\n')
    assert len(opened(tmp_path, path=path)) + len(opened(tmp_path, "test", path=path)) == 99
    assert "the first: a.jsonl, line 100: has no messages." in opened(tmp_path, path=path).describe()[1]
    with pytest.raises(UserError) as error:
        opened(tmp_path, max_bad=0.0, path=path)
    (problem,) = error.value.problems
    assert problem.endswith(": a.jsonl, line 100: has no messages.")
    assert "Fix the row; or data.max_bad_fraction=0.01 leaves such rows out." in error.value.fix
    with path.open("a", encoding="utf-8") as file:
        file.write('{"messages": []}\n{"messages": [{"role": "us')
    with pytest.raises(UserError, match=r"3 of 102 rows are bad, 2\.94%; data\.max_bad_fraction=0\.01 allows") as error:
        opened(tmp_path, max_bad=0.01, path=path)
    (problem,) = error.value.problems
    assert problem.splitlines()[-2:] == [
        "  1 × invalid JSON:",
        "    a.jsonl, line 102: is not valid JSON (unterminated string, column 24).",
    ]
    assert "data.max_bad_fraction=0.03 leaves" in error.value.fix
    with pytest.raises(UserError, match="its files hold no conversation"):
        opened(tmp_path, path=write(tmp_path / "empty.jsonl"))


def test_several_sets_stand_beside_the_tasks(tmp_path: Path) -> None:
    own = {"a": {"path": str(write(tmp_path / "a.jsonl", *range(40)))}, "b-2": None}
    own["c"] = {"path": str(write(tmp_path / "c.jsonl", *range(50, 90))), "repeat": 3}
    settings = build(MixtureSettings, {"tasks": {"identity": {"repeat": 1}, "conversations": own}}, "mixture")
    mixture: Mixture = build_mixture(settings, "train", TaskContext(tmp_path))
    assert list(mixture.tasks) == ["a", "c", "identity"] and mixture.repeats["c"] == 3
    assert sum(mixture.place(i)[0] == "c" for i in range(len(mixture))) == 3 * len(mixture.tasks["c"])
    assert build(MixtureSettings, to_plain(settings)) == settings
    judged = only_judged(settings)
    assert judged is not None and list(judged.tasks.chosen()) == ["identity"]
    with pytest.raises(UserError, match="ground-truth answers"):
        mixture.tasks["a"].evaluate(mixture.tasks["a"][0], "1")


def test_a_mirror_of_the_hub_is_looked_at_before_what_was_downloaded(tmp_path: Path) -> None:
    folder = tmp_path / "hub/datasets/HuggingFaceTB/smol-smoltalk/data"
    write(folder / "train-00000-of-00001.jsonl", *range(20))
    write(folder / "test-00000-of-00001.jsonl", *range(50, 55))
    context = TaskContext(tmp_path / "cache", hub=tmp_path / "hub")

    def smoltalk(split: Any, in_context: TaskContext = context, **keys: Any) -> ConversationSet:
        return build_tasks(build(MixtureTasks, {"smoltalk": keys}), split, in_context)["smoltalk"]  # type: ignore[return-value]

    assert answers(smoltalk("train", start=5, size=3)) == ["5", "6", "7"] and len(smoltalk("test")) == 5
    assert smoltalk("train").origin(3) == ("data/train-00000-of-00001.jsonl", 4)
    assert len(smoltalk("train", files="*train*")) == 18, "of one file a hash holds out some"
    with pytest.raises(UserError, match=r"mixture\.tasks\.smoltalk\.files='x\*': .*smol-smoltalk has no such file"):
        smoltalk("train", files="x*")
    for elsewhere, keys in ((TaskContext(tmp_path / "cache"), {}), (context, {"revision": "v2"})):
        with pytest.raises(UserError, match=r"mixture\.tasks\.smoltalk: nothing of HuggingFaceTB/smol-smoltalk"):
            smoltalk("train", elsewhere, **keys)
    in_suite = TaskContext(tmp_path / "cache", where="chatcore")
    with pytest.raises(UserError, match=r"chatcore\.smoltalk: nothing of"):
        smoltalk("test", in_suite)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"smoltalk": {"pth": "x"}}, "did you mean mixture.tasks.smoltalk.path?"),
        ({"conversations": {"a": {}}}, "mixture.tasks.conversations.a.path: say where the conversations are"),
        ({"conversations": {"a": {"path": "x", "repo": "o/n"}}}, "say where"),
        ({"conversations": {"a": {"repo": "o/n/x"}}}, "repo='o/n/x': is no data set's name"),
        ({"conversations": {"a": {"path": "x", "files": "y"}}}, "files='y': has no meaning without repo"),
        ({"conversations": {"a": {"path": "x", "size": 0}}}, "mixture.tasks.conversations.a.size=0: is below 1"),
        ({"conversations": {"spelling": {"path": "x"}}}, "a task has that name"),
        ({"conversations": {"../a": {"path": "x"}}}, "names have letters"),
        ({"conversations": {"a": None}}, "no task is chosen"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        build(MixtureSettings, {"tasks": values}, "mixture")
    assert message in str(error.value)


def test_a_data_set_of_the_hub_is_fetched_when_asked_and_then_read_without_it(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = shared / "data/hub/datasets/OpenAssistant/oasst-en100-messages/default"
    files = {f"default/{path.name}": path.read_bytes() for path in sorted(real.glob("*.parquet"))}
    with serving_this_process(tmp_path / "hf", monkeypatch) as hub:
        hub.add("some-owner/talks", files)
        with pytest.raises(UserError, match="nothing of some-owner/talks") as error:
            opened(tmp_path, repo="some-owner/talks")
        command = error.value.fix.removeprefix("Fetch it: nanochat-pl ").split()
        assert command == ["download", "data=hub", "data.repo=some-owner/talks", f"paths.cache={tmp_path}"]
        assert main(command) == 0
        assert "mixture.tasks.conversations.NAME.repo=some-owner/talks" in capsys.readouterr().out
        requests = len(hub.requests)
        train, test = (opened(tmp_path, split, repo="some-owner/talks") for split in ("train", "test"))
        assert (len(train), len(test)) == (512, 52) and train.origin(511)[1] == 511
        local = opened(tmp_path, path=real)
        assert [train[i] for i in range(512)] == [local[i] for i in range(512)]
        assert len(hub.requests) == requests, "no network unless asked"
