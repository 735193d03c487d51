"""`nanochat-pl download`, and a training on what it fetched."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_pl.cli import download
from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import UserError
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.published.gsm8k import GSM8K, GSM8KSettings
from nanochat_pl.tasks.registry import all_tasks
from nanochat_pl.tokenizer import comparison
from tests.data.test_hub import FILES, IN_GIT, REPO, parquet
from tests.helpers.hub_server import Answer, HubServer, serving, serving_this_process
from tests.training.conftest import tiny_overrides, write_texts

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving_this_process(here / "hf", monkeypatch) as server:
        server.add(REPO, FILES, IN_GIT)
        yield server


def test_download_then_again_then_what_to_do_next(hub: HubServer, here: Path, capsys: Captured) -> None:
    command = ["download", f"data.repo={REPO}", "num_shards=2", "paths.cache=cache"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "Fetched 3 files" in said.out and str(here / "hf") in said.out
    assert "2 of 4 files" in said.out and "validated on shard_00004.parquet" in said.out
    assert f"nanochat-pl train stage=base data=hub data.repo={REPO} paths.cache=cache\n" in said.out
    assert said.err == ""  # no bars of the library
    requests = len(hub.requests)
    assert main(command) == 0
    assert "Nothing to fetch: 3 files are here and verified." in capsys.readouterr().out
    assert len(hub.requests) == requests


def test_a_download_that_ended_early_goes_on_with_what_is_missing(hub: HubServer, here: Path, capsys: Captured) -> None:
    hub.fail("GET", "/resolve/.*00002", Answer(404))
    command = ["download", f"data.repo={REPO}", "paths.cache=cache", "parallel=1"]
    assert main(command) == 2
    assert re.search(r"shard_00002\.parquet: .*404", capsys.readouterr().err)
    done = len(hub.downloads())
    assert main(command) == 0
    assert {path[-10:-8] for path, _ in hub.downloads()[done:]} in ({"02"}, {"02", "03"})


@pytest.mark.slow
def test_the_variables_of_the_library_are_kept_to(here: Path) -> None:
    """It reads them when it is loaded, so this takes a process: mirror, home, offline mode."""
    code = "import sys; from nanochat_pl.cli.main import main; sys.exit(main())"

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        command = [sys.executable, "-c", code, "download", f"data.repo={REPO}", "paths.cache=cache", *arguments]
        return subprocess.run(
            command, env={**kept, **variables}, cwd=here, capture_output=True, text=True, encoding="utf-8", check=False
        )

    with serving() as hub:
        hub.add(REPO, FILES, IN_GIT)
        homes = {"HF_HOME": str(here / "home"), "HF_ENDPOINT": hub.url}
        first = run("num_shards=2", **homes)
        assert (first.returncode, first.stderr) == (0, "")
        assert len(list((here / "home").rglob("shard_*.parquet"))) == len(hub.downloads()) == 3
        requests = len(hub.requests)
        offline = run("num_shards=4", HF_HUB_OFFLINE="1", **homes)
        assert offline.returncode == 2 and "HF_HUB_OFFLINE forbids" in offline.stderr
        assert len(hub.requests) == requests


def test_training_takes_what_was_fetched_and_says_what_it_lacks(hub: HubServer, here: Path, capsys: Captured) -> None:
    texts = (write_texts(here / "texts") / "texts.txt").read_text(encoding="utf-8").split("\n\n")
    hub.add("some-owner/small", {f"part-{n}.parquet": parquet([*texts[n::4]]) for n in range(4)})
    keys = ["data=hub", "data.repo=some-owner/small", f"paths.cache={here / 'cache'}"]
    tiny = [text for text in tiny_overrides(here) if not text.startswith(("data", "paths.cache", "max_steps"))]
    train = ["train", "stage=base", *keys, *tiny, "max_steps=60", "run=a"]
    assert main(train) == 2
    assert "nanochat-pl download data=hub data.repo=some-owner/small" in capsys.readouterr().err
    assert hub.requests == []  # nobody asked for a download
    assert main(["download", *keys, "num_shards=1"]) == 0
    requests = len(hub.requests)
    capsys.readouterr()
    assert main(train) == 0
    said = capsys.readouterr().out
    assert "1 of 3 training files" in said and re.search(r"num_shards=[23]\n", said) and "part-3.parquet" in said
    assert len(hub.requests) == requests
    assert main([*train, "data.download=true"]) == 0  # it has no say in the result
    assert "is finished" in capsys.readouterr().out
    own_text = ["evaluate", "run=a", f"paths.runs={here / 'runs'}", f"data_path={here / 'texts'}", "suites=[bpb]"]
    assert main(own_text) == 0


@pytest.mark.slow
def test_a_stopped_training_goes_on_after_more_has_been_fetched(
    hub: HubServer, here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own advice, to fetch more, made it other data, and the run could not be finished any more."""
    texts = (write_texts(here / "texts") / "texts.txt").read_text(encoding="utf-8").split("\n\n")
    hub.add("some-owner/small", {f"part-{n}.parquet": parquet([*texts[n::8]]) for n in range(8)})
    keys = ["data=hub", "data.repo=some-owner/small", f"paths.cache={here / 'cache'}"]
    tiny = [text for text in tiny_overrides(here) if not text.startswith(("data", "paths.cache", "max_steps"))]
    train = ["train", "stage=base", *keys, *tiny, "max_steps=10", "run=a"]
    assert main(["download", *keys, "num_shards=2"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("nanochat_pl.training.run._finish", _stop)
        assert main(train) == 130
    assert main(["download", *keys, "num_shards=4"]) == 0
    capsys.readouterr()
    assert main([*train, "data.num_shards=3"]) == 2
    assert "was begun with data.num_shards=2" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("nanochat_pl.training.run._finish", _stop)
        assert main([*train, "data.num_shards=2"]) == 130  # the number that it has
    capsys.readouterr()
    assert main(train) == 0
    said = capsys.readouterr().out
    assert "2 more files are here" in said and "goes on with its 2" in said and "going on after step 10" in said


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("besides", [{}, {"LICENSE.txt": b"Do as you like."}])
def test_conversations_in_json_are_fetched_too(
    hub: HubServer, here: Path, capsys: Captured, besides: dict[str, bytes]
) -> None:
    """The pages promise them; the command knew only the formats of text."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    data = json.dumps([{"messages": turns}] * 3, indent=1).encode()
    hub.add("some-owner/talk", {"talk.json": data, **besides})
    assert main(["download", "data=hub", "data.repo=some-owner/talk", "paths.cache=cache"]) == 0
    assert "mixture.tasks.conversations.NAME.repo=some-owner/talk" in capsys.readouterr().out
    assert [path[-9:] for path, _ in hub.downloads() if path.endswith(".json")] == ["talk.json"]


def test_a_large_data_set_is_not_fetched_by_accident(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(download, "UNASKED_BYTES", 1000)
    assert main(["download", f"data.repo={REPO}", "paths.cache=cache"]) == 2
    assert "num_shards: is missing; all 4 files" in capsys.readouterr().err
    assert hub.downloads() == []


def gsm8k_table(count: int) -> bytes:
    questions = [f"What is {n} plus 1?" for n in range(count)]
    answers = [f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}" for n in range(count)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"question": questions, "answer": answers}), sink)
    return sink.getvalue()


@pytest.mark.parametrize("given", [[], ["repo=some-owner/sums", "config=all"]])
def test_a_task_s_tables_are_fetched_and_found(hub: HubServer, here: Path, capsys: Captured, given: list[str]) -> None:
    repo, config = ("some-owner/sums", "all") if given else ("openai/gsm8k", "main")
    files = {f"{config}/{split}-00000-of-00001.parquet": gsm8k_table(n) for split, n in (("train", 9), ("test", 4))}
    hub.add(repo, {**files, "elsewhere/train-00000-of-00001.parquet": gsm8k_table(3), "README.md": b"# Sums\n"})
    settings = GSM8KSettings(**dict(text.split("=") for text in given))  # type: ignore[arg-type]
    context = TaskContext(here / "cache")
    with pytest.raises(UserError) as error:
        GSM8K(settings, "test", context)
    assert hub.requests == []
    command = shlex.split(error.value.fix.removeprefix("Fetch it: nanochat-pl "))
    assert command == ["download", "task=gsm8k", *given, f"paths.cache={here / 'cache'}"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "Fetched 2 files" in said.out and said.err == ""
    assert "nanochat-pl train stage=sft" in said.out and "mixture.tasks.gsm8k" in said.out
    assert {path.rpartition("/")[2][:5] for path, _ in hub.downloads()} == {"train", "test-"}
    assert [len(GSM8K(settings, split, context)) for split in ("train", "test")] == [9, 4]
    requests = len(hub.requests)
    assert main(command) == 0
    assert "Nothing to fetch: 2 files" in capsys.readouterr().out
    assert len(hub.requests) == requests


def test_every_task_of_the_hub_can_be_fetched(hub: HubServer, here: Path, capsys: Captured) -> None:
    """Whatever the tables hold: their files are those that the task would read."""
    files: dict[str, dict[str, bytes]] = {}
    for name, kind in all_tasks().items():
        if repo := getattr(kind.settings(), "repo", None):
            config = getattr(kind.settings(), "config", "data")
            files.setdefault(repo, {})[f"{config}/test-00000-of-00001.parquet"] = parquet([name])
    assert len(files) >= 5
    for repo, tables in files.items():
        hub.add(repo, tables)
    for name, kind in all_tasks().items():
        is_made = not getattr(kind.settings(), "repo", None)
        assert main(["download", f"task={name}", "paths.cache=cache"]) == (2 if is_made else 0)
        said = capsys.readouterr()
        assert (f"task={name}: is made on this machine" if is_made else "Fetched 1 file") in said.out + said.err
        if not is_made:
            use = "train stage=sft" if kind.cls.has_training_part else "evaluate 'suites=[chatcore]'"
            assert use in said.out and "paths.cache=cache" in said.out


def test_the_evaluation_bundle_is_fetched_once(here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[tuple[Path, bool]] = []

    def fetch(cache_dir: Path, refresh: bool) -> tuple[Path, bool]:
        fetched.append((cache_dir, refresh))
        return cache_dir / "eval_bundle", len(fetched) == 1

    monkeypatch.setattr(download, "fetch_eval_bundle", fetch)
    assert main(["download", "eval_bundle=true", "paths.cache=cache"]) == 0
    said = capsys.readouterr().out
    assert "Fetched the evaluation bundle" in said and "cache/eval_bundle" in said
    assert "nanochat-pl evaluate 'suites=[core]' paths.cache=cache" in said
    assert main(["download", "eval_bundle=true", "paths.cache=cache", "refresh=true"]) == 0
    assert "Nothing to fetch" in capsys.readouterr().out
    assert fetched == [(Path("cache"), False), (Path("cache"), True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=python_docs"], "data=python_docs: is on this machine"),
        ([], "data.repo=None: data=hub needs the data set's name"),
        (["data=climbmix", "data.repo=a/b/c"], "data.repo='a/b/c'"),
        (["data=climbmix", "num_shards=0"], "num_shards=0: is below 1"),
        (["data=local", "data.path=x", "data.repo=a/b"], "data.repo='a/b': has no meaning for data=local"),
        (["data=climbmixx"], "did you mean climbmix"),
        (["task=gsm9k"], "task=gsm9k: there is no such task; did you mean gsm8k"),
        (["task=arithmetic"], "is made on this machine"),
        (["task=smoltalk", "config=all"], "config: the data of smoltalk has no such part"),
        (["task=gsm8k", "repo=nowhere"], "repo='nowhere': is no data set's name"),
        (["task=gsm8k", "num_shards=3"], "num_shards: has no meaning with task"),
        (["task=gsm8k", "data=climbmix"], "data: has no meaning with task"),
        (["task=gsm8k", "eval_bundle=true"], "one thing at a time"),
        (["eval_bundle=true", "revision=x"], "revision: has no meaning with eval_bundle"),
        (["task=gsm8k", "tokenizers=true"], "task, tokenizers: one thing at a time"),
        (["tokenizers=true", "num_shards=3"], "num_shards: has no meaning with tokenizers"),
        (["tokenizers=true", "refresh=true"], "refresh: has no meaning with tokenizers"),
        (["data=climbmix", "repo=a/b"], "repo: has no meaning without task"),
        (["repo=a/b"], "repo: has no meaning without task"),
        (["config=main", "revision=x"], "revision: has no meaning without task"),
        (["task=null", "repo=a/b", "data=climbmix"], "repo: has no meaning without task"),
    ],
)
def test_a_mistake_is_named(here: Path, arguments: list[str], message: str, capsys: Captured) -> None:
    assert main(["download", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_known_tokenizers_are_fetched_into_tiktokens_cache(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(here / "tiktoken"))

    def get_encoding(name: str) -> Any:
        (here / "tiktoken").mkdir(exist_ok=True)
        for url in next(other.urls for other in comparison._OTHERS if other.encoding == name):
            (here / "tiktoken" / hashlib.sha1(url.encode()).hexdigest()).write_bytes(b"of the server")

    monkeypatch.setattr("tiktoken.get_encoding", get_encoding)
    assert main(["download", "tokenizers=true"]) == 0
    said = capsys.readouterr().out
    assert "Fetched the tokenizers of GPT-2 and GPT-4." in said and str(here / "tiktoken") in said
    assert "nanochat-pl evaluate 'suites=[tokenizer]'" in said
    assert main(["download", "tokenizers=true"]) == 0
    assert "Nothing to fetch" in capsys.readouterr().out


def test_a_tokenizer_that_cannot_be_fetched_is_one_message(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def get_encoding(name: str) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(here / "tiktoken"))
    monkeypatch.setattr("tiktoken.get_encoding", get_encoding)
    assert main(["download", "tokenizers=true"]) == 2
    error = capsys.readouterr().err
    assert "GPT-2: it cannot be loaded: no route." in error and "TIKTOKEN_CACHE_DIR" in error
