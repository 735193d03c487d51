"""Kinds of faults in YAML of one's own, checkpoints of others, data sets of the hub, and printed next steps."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.yaml_files import read_yaml
from nanochat_pl.config.experiment import read_experiment
from nanochat_pl.convert.nanochat.layout import choose_checkpoint, stage_of
from nanochat_pl.data.sources.base import SourceSettings
from nanochat_pl.data.sources.hub import HubFiles
from tests.helpers.hub_server import serving_this_process


def refused(text: str, tmp_path: Path) -> str:
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_yaml(tmp_path / "a.yaml")
    assert str(tmp_path / "a.yaml") in str(error.value)
    return str(error.value)


def test_17_keys_that_stand_twice(shared: Path) -> None:
    for name, said in (
        ("dup", "dup.yaml: shared.max_steps stands in line 8 and again in line 9."),
        ("dotdup", "dotdup.yaml: shared.optim.matrix_lr stands in line 9 and again in line 10."),
    ):
        with pytest.raises(UserError) as error:
            read_experiment(str(shared / f"cases/17_yaml_duplicate_keys/{name}.yaml"))
        assert str(error.value).endswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: {b: 1, b: 2}", "a.b stands in line 1 and again in line 1"),
        ("x:\n- a: 1\n  a: 2\n", "x[0].a stands in line 2 and again in line 3"),
        ("m.d: 1\nm:\n  s: 3\n  d: 2\n", "m.d stands in line 1 and again in line 4"),
        ("m:\n  a.b: {c: 1}\n  a: {b.c: 2}\n", "a.b.c stands in line 2 and again in line 3"),
    ],
)
def test_other_keys_that_stand_twice(text: str, said: str, tmp_path: Path) -> None:
    assert said in refused(text, tmp_path)


def test_18_numbers_are_those_of_the_command_line(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shared / "cases/18_yaml_1e-3/exp.yaml"
    assert read_experiment(str(file))[0].shared["optim.matrix_lr"] == 0.001
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("one two three. " * 2000, encoding="utf-8")
    text = ["data=local", "data.path=text.txt", "max_steps=2", "schedule.warmup_steps=1", "yes=true"]
    check = ["train", f"experiment={file}", "stage=base", "check_only=true", "paths.cache=c", *text]
    assert main(check) == 0 and "0.001" in capsys.readouterr().out
    numbers_as_text = "[1e-3, 1E5, -2.5e+3, 1_000, 3, .5, 1., 10:30, 2026-01-02, 2001-99-99, 007, 0x1f, '1e-3', true]"
    (tmp_path / "a.yaml").write_text(numbers_as_text, encoding="utf-8")
    numbers = [0.001, 1e5, -2500.0, 1000, 3, 0.5, 1.0, "10:30", "2026-01-02", "2001-99-99", "007", 31, "1e-3", True]
    assert read_yaml(tmp_path / "a.yaml") == numbers


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [*a]", "*a is part of what it names"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)),
            "100,000",
        ),
        ("[" * 10_000, "nested deeper than 50 levels in line 1"),
        ("".join(f"key{n}: 1\n" for n in range(1_000_000)), "more than the 262,144"),
        ("a: !!python/object/apply:os.system [x]", "!!python/object/apply:os.system in line 1"),
        ("a: 1\nb: !!timestamp 2001-99-99", "!!timestamp in line 2"),
        ("a: !!int x", "'x' is no number that can be read in line 1"),
        ("a: 1\nb: [", "is no YAML"),
        ("? [a]\n: b", "is no YAML"),
        ("a: <<", "'<<' is no value, but the key that merges a group; put quotes around it in line 1"),
        ("a: {<<: 3}", "is no YAML: expected a mapping"),
        ("a: *b", "undefined alias 'b' in line 1"),
    ],
)
def test_yaml_that_takes_for_ever_or_is_odd(text: str, said: str, tmp_path: Path) -> None:
    assert said in refused(text, tmp_path)


def test_merge_keys_are_yaml(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: [*a, {z: 4}]}\nd: '<<'\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    merged = {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2, "z": 4}, "d": "<<"}
    assert read_yaml(tmp_path / "a.yaml") == merged


@pytest.mark.timeout(20)
def test_an_experiment_that_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("a.yaml")
    with pytest.raises(UserError, match=r"a\.yaml: is a FIFO"):
        read_experiment("a.yaml")
    Path("b.yaml").write_bytes("pipeline: [base]".encode("utf-16"))
    with pytest.raises(UserError, match=r"b\.yaml: is not UTF-8: it is UTF-16"):
        read_experiment("b.yaml")


def flat(shared: Path, tmp_path: Path) -> Path:
    to = tmp_path / "flat"
    to.mkdir()
    for path in (shared / "cases/20_flat_chat_checkpoint/flat").iterdir():
        shutil.copyfile(path, to / path.name)
    return to


def test_20_a_flat_chat_checkpoint_is_one(shared: Path, tmp_path: Path) -> None:
    source = flat(shared, tmp_path)
    checkpoint = choose_checkpoint(source, None, None, None)
    meta = json.loads(checkpoint.meta.read_text())
    assert stage_of(checkpoint, None) == "sft" and stage_of(checkpoint, "mid") == "mid"
    config = {"step": 90, "model_config": meta["model_config"]}
    for metrics, stage in (
        ({"val_bpb": 0.9}, "base"),
        ({"val_bpb": 0.9, "user_config": {"mmlu_epochs": 3}}, "sft"),
        ({"gsm8k_acc": 0.1}, "sft"),
    ):
        checkpoint.meta.write_text(json.dumps(config | metrics))
        assert stage_of(checkpoint, None) == stage
    checkpoint.meta.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"nothing says whether model_000090\.pt is a base model or a chat") as error:
        stage_of(checkpoint, None)
    assert "stage=sft" in error.value.fix


def test_21_the_printed_next_steps_run(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = flat(shared, tmp_path)
    monkeypatch.chdir(tmp_path)
    for to in ("to=my bundle", "run=imported"):
        assert main(["import", f"source={source}", to]) == 0
        commands = re.findall(r"nanochat-pl (.*)", capsys.readouterr().out)
        assert [command.split()[0] for command in commands] == ["chat", "evaluate"]
        chat, evaluate = map(shlex.split, commands)
        assert main([*evaluate, "suites=[samples]", "paths.cache=c"]) == 0
        assert main([*chat, "prompt=hi", "max_tokens=2"]) == 0
        capsys.readouterr()
    assert (tmp_path / "my bundle-evaluation/results.json").is_file()


def test_23_configurations_of_a_data_set_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parquet(texts: list[str]) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(pa.table({"text": texts}), buffer)
        return buffer.getvalue()

    folders = ("wikitext-103-v1", "wikitext-2-v1", "wikitext-103-raw-v1")
    files = {
        f"{folder}/{split}-00000-of-00001.parquet": parquet([f"{folder} {split} {n}" for n in range(9)])
        for folder in folders
        for split in ("train", "validation", "test")
    }
    with serving_this_process(tmp_path / "hf", monkeypatch) as hub:
        hub.add("me/wikitext", files)
        source = HubFiles(SourceSettings("hub", repo="me/wikitext"), tmp_path / "cache", ask_hub=True)
        configs, unused = source.remarks()
        assert all(folder in configs for folder in folders) and "3 folders" in configs
        assert unused.startswith("3 files, the first wikitext-103-raw-v1/test-00000")
        source.fetch(3)
        assert configs in source.describe()
        glob = re.search(r"data\.files='(\S+)' takes one", configs)
        assert glob
        one = HubFiles(SourceSettings("hub", repo="me/wikitext", files=glob[1]), tmp_path / "cache", ask_hub=True)
        assert len(one.remarks()) == 1 and len(one.train_files) == 1, "the advice is followed and holds"
