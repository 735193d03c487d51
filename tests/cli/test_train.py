"""The command `train` around the training itself: what may change when a stage goes on, its records, its last words."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from nanochat_pl.cli import train
from nanochat_pl.cli.main import main
from nanochat_pl.cli.run_record import require_same_settings, write_records
from nanochat_pl.cli.train import compose_train, place_of, with_parent
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import write_json
from nanochat_pl.common.run_dir import StageFolder
from tests.cli.conftest import pretend_finished

TINY = "experiment=tiny"


@pytest.fixture
def trained(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[StageFolder]:
    """The folders that would have been trained; nothing is."""
    folders: list[StageFolder] = []
    monkeypatch.setattr(train, "_train", lambda composed, folder, end: folders.append(folder) or 0)
    return folders


@pytest.mark.parametrize(
    ("stage", "override", "matters"),
    [
        ("base", "max_steps=11", True),
        ("base", "data.seed=1", True),
        ("base", "mixture.tasks.spelling.size=3", False),
        ("base", "evaluation.every_steps=3", False),
        ("base", "trainer.keep_last=5", False),
        ("base", "device_batch_size=1", False),
        ("sft", "mixture.tasks.spelling.size=3", True),
        ("sft", "schedule.warmup_steps=3", True),
        ("sft", "data.seed=1", False),
        ("sft", "tokenizer.vocab_size=600", False),
        ("tokenizer", "tokenizer.vocab_size=600", True),
        ("tokenizer", "model.depth=3", False),
    ],
)
def test_what_may_change_when_a_stage_goes_on(stage: str, override: str, matters: bool, here: Path) -> None:
    folder = pretend_finished(TINY, f"stage={stage}")
    changed = with_parent(compose_train([TINY, f"stage={stage}", override]), folder)
    with pytest.raises(UserError, match=override) if matters else contextlib.nullcontext():
        require_same_settings(folder, changed)


def test_a_task_more_or_less_is_one_line_and_says_how_to_begin_anew(here: Path) -> None:
    """It was a line for each of its keys, and a run of another name was offered, in which there is no base."""
    folder = pretend_finished(TINY, "stage=sft")
    other = [TINY, "stage=sft", "mixture.tasks.simple_spelling={}", "mixture.tasks.word_problems=null"]
    with pytest.raises(UserError) as raised:
        require_same_settings(folder, with_parent(compose_train(other), folder))
    assert [problem.split(":")[0] for problem in raised.value.problems] == [
        "mixture.tasks.simple_spelling",
        "mixture.tasks.word_problems",
    ]
    assert [problem.rpartition("begun ")[2] for problem in raised.value.problems] == [
        "without that task.",
        "with that task.",
    ]
    assert "resume=never" in raised.value.fix and "run=NEW" not in raised.value.fix


def test_a_stage_that_is_older_than_a_key_was_done_with_its_default(here: Path) -> None:
    """A new key with a default made strangers of all runs that had been begun before it."""
    folder = pretend_finished(TINY, "stage=base")
    path = folder.path / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    del config["model"]["qk_scale"]
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    require_same_settings(folder, compose_train([TINY, "stage=base"]))
    with pytest.raises(UserError, match=r"model.qk_scale=1.0: .* was begun with model.qk_scale=1.2"):
        require_same_settings(folder, compose_train([TINY, "stage=base", "model.qk_scale=1.0"]))


def test_a_stage_that_is_older_than_a_key_of_its_tasks_was_done_with_its_default(here: Path) -> None:
    """The defaults of the default tasks alone were known: not of one's own files, nor of tasks out of data sets."""
    more = ["mixture.tasks.gsm8k={}", "mixture.tasks.conversations.mine.path=a.jsonl", "mixture.tasks.spelling.step=1"]
    folder = pretend_finished(TINY, "stage=sft", *more)
    path = folder.path / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    del config["stage"]["loss_mask"]
    tasks = config["mixture"]["tasks"]
    for task in (tasks["gsm8k"], tasks["conversations"]["mine"], tasks["spelling"]):
        for key in ("step", "test_start", "test_step"):
            del task[key]
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    require_same_settings(folder, with_parent(compose_train([TINY, "stage=sft", *more]), folder))
    for key in ("stage.loss_mask=all", "mixture.tasks.gsm8k.step=2", "mixture.tasks.conversations.mine.test_step=2"):
        with pytest.raises(UserError, match=f"{key}: "):
            require_same_settings(folder, with_parent(compose_train([TINY, "stage=sft", *more, key]), folder))


def test_a_tokenizer_made_on_the_way_has_settings_too(here: Path) -> None:
    """It has no config.yaml, so it was finished for any settings."""
    folder = pretend_finished(TINY, "stage=tokenizer")
    (folder.path / "config.yaml").unlink()
    assert main(["train", TINY, "stage=tokenizer"]) == 0
    assert main(["train", TINY, "stage=tokenizer", "tokenizer.vocab_size=600"]) == 2


def test_what_another_process_has_just_finished_is_finished(
    trained: list[StageFolder], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That was looked at before the wait for the lock: the stage was trained over the finished one."""

    @contextlib.contextmanager
    def locked(folder: StageFolder) -> Iterator[None]:
        pretend_finished(TINY)
        yield

    monkeypatch.setattr(StageFolder, "locked", locked)
    assert main(["train", TINY]) == 0
    assert trained == []
    assert "is finished" in capsys.readouterr().out


def test_records_are_those_of_the_beginning_and_of_today(here: Path, trained: list[StageFolder]) -> None:
    """The settings of a stage that goes on were those of its beginning, the number of its threads too."""
    assert main(["train", TINY]) == 0
    folder = trained[0]
    about = json.loads((folder.path / "about.json").read_text(encoding="utf-8"))
    age = datetime.now(UTC) - datetime.fromisoformat(about["started"])
    assert timedelta() <= age + timedelta(seconds=1) < timedelta(minutes=1)

    write_json(folder.path / "about.json", {**about, "started": "long ago"})
    folder.checkpoints.mkdir()
    (folder.checkpoints / "step=000005.ckpt").touch()
    assert main(["train", TINY, "trainer.num_threads=1"]) == 0
    config = yaml.safe_load((folder.path / "config.yaml").read_text(encoding="utf-8"))
    assert config["trainer"]["num_threads"] == 1
    assert "long ago" in (folder.path / "about.json").read_text(encoding="utf-8")


def test_the_next_commands_find_the_run(trained: list[StageFolder], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", TINY, "run=a"]) == 0
    assert "nanochat-pl train stage=sft run=a\n" in capsys.readouterr().out
    assert main(["train", TINY, "run=a", "paths.runs=my runs"]) == 0
    shown = capsys.readouterr().out
    assert "nanochat-pl train stage=sft run=a 'paths.runs=my runs'\n" in shown
    assert "nanochat-pl report run=a 'paths.runs=my runs'\n" in shown


@pytest.mark.parametrize(
    ("stage", "shown", "not_shown"),
    [
        ("tokenizer", ["tokenizer.vocab_size", "512", "python_docs"], ["model.depth", "Plan", "parameters"]),
        ("sft", ["mixture.tasks.spelling.size", "runs/tiny/base, which is not finished yet"], ["Plan", "vocab_size"]),
        ("base", ["Plan for", "num_steps"], []),
    ],
)
def test_a_check_says_what_is_known(
    stage: str, shown: list[str], not_shown: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For every stage it printed the plan of a base stage."""
    assert main(["train", TINY, f"stage={stage}", "check_only=true"]) == 0
    out = capsys.readouterr().out
    assert [text for text in shown if text not in out] == []
    assert [text for text in not_shown if text in out] == []
    assert list(here.iterdir()) == []


def test_records_hold_the_settings_of_the_command(here: Path) -> None:
    composed = compose_train([TINY, "seed=3"])
    folder = place_of(composed)
    write_records(folder, composed)
    assert (folder.path / "overrides.txt").read_text(encoding="utf-8") == "experiment=tiny\nseed=3\n"
    assert yaml.safe_load((folder.path / "config.yaml").read_text(encoding="utf-8")) == composed.plain()


def test_a_run_begun_anew_says_its_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretend_finished(TINY)
    place_of(compose_train([TINY]))
    assert capsys.readouterr().out == ""
    assert place_of(compose_train([TINY, "resume=never"])).run == "tiny-2"
    assert capsys.readouterr().out == "New run: tiny-2.\n"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data=local", "data.path=gone"], "data.path='gone': there is no such file or folder (seen from "),
        (["data=local", "data.path=empty"], "data.path='empty': there are no files in this folder."),
        (["data=local", "data.path=empty.txt"], "data.path='empty.txt': this file is empty."),
        (
            ["stage=sft", "mixture.tasks.conversations.mine.path=gone.jsonl"],
            "mixture.tasks.conversations.mine.path='gone.jsonl': there is no such file or folder",
        ),
    ],
)
def test_files_that_are_not_there_are_told_before_anything_begins(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    said: str,
) -> None:
    """The machine was prepared first: some 12 seconds, or minutes, for a typing error."""
    monkeypatch.setattr(train, "_train", lambda *rest: pytest.fail("began"))
    (here / "empty" / "below").mkdir(parents=True)
    (here / "empty" / ".hidden").touch()
    (here / "empty.txt").touch()
    before = sorted(here.rglob("*"))
    assert main(["train", TINY, *overrides]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {said}") and err.count("error: ") == 1
    assert sorted(here.rglob("*")) == before


def test_a_finished_stage_needs_its_files_no_more(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = (TINY, "stage=base", "data=local", "data.path=gone")
    pretend_finished(*keys)
    assert main(["train", *keys]) == 0
    assert "is finished" in capsys.readouterr().out
