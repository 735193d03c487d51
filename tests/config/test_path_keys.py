"""What is said of a path that cannot be one: the same for every key that takes a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat_pl.cli.doctor import DoctorConfig
from nanochat_pl.cli.evaluate_settings import EvaluateConfig
from nanochat_pl.cli.export import ExportConfig
from nanochat_pl.cli.import_ import ImportConfig
from nanochat_pl.cli.selftest import SelftestConfig
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build
from nanochat_pl.config.compose import compose
from nanochat_pl.config.experiment import compose_step
from nanochat_pl.data.files.folder import find_files
from nanochat_pl.training.config import TrainConfig

LOOP = "loop"
WRONG = {
    "": "is empty. Give a path",
    "~nosuchuser/x": "there is no home folder ~nosuchuser.",
    "y" * 300: "cannot be looked at: File name too long.",
    "/y" * 3000: "cannot be looked at: File name too long.",
    LOOP: "cannot be looked at: Too many levels of symbolic links.",
    "a\udcffb": "is no path: it has bytes that are not UTF-8, or a NUL.",
    "a\0b": "is no path: it has bytes that are not UTF-8, or a NUL.",
}
CONVERSATIONS = "mixture.tasks.conversations.m"
KEYS = [
    *((TrainConfig, key) for key in ("paths.runs", "paths.cache", "paths.hub")),
    *((TrainConfig, key) for key in ("data.path", "data.validation_path", "evaluation.core.path")),
    *((TrainConfig, f"{CONVERSATIONS}.{key}") for key in ("path", "test_path")),
    *((TrainConfig, f"mixture.tasks.{key}") for key in ("gsm8k.path", "spelling.words_path")),
    *((EvaluateConfig, key) for key in ("bundle", "to", "against", "data_path", "core.path")),
    (EvaluateConfig, "harness.include_path"),
    *((ImportConfig, key) for key in ("source", "to", "tokenizer")),
    *((ExportConfig, key) for key in ("bundle", "to")),
    (DoctorConfig, "eval_bundle"),
    (SelftestConfig, "to"),
]


def nested(key: str, value: str) -> dict[str, object]:
    name, _, rest = key.partition(".")
    return {name: nested(rest, value) if rest else value}


@pytest.fixture(autouse=True)
def loop(here: Path) -> None:
    (here / LOOP).symlink_to(LOOP)


@pytest.mark.parametrize(("schema", "key"), KEYS)
def test_every_key_of_a_path_is_checked_alike(schema: type, key: str) -> None:
    for value, problem in WRONG.items():
        with pytest.raises(UserError) as caught:
            build(schema, nested(key, value))
        said = [line for line in caught.value.problems if line.startswith(f"{key}=")]
        assert len(said) == 1, caught.value.problems
        assert problem in said[0]
        assert len(said[0]) < 500


@pytest.mark.parametrize("value", WRONG)
def test_files_to_read_are_checked_also_where_no_configuration_was(value: str) -> None:
    with pytest.raises(UserError, match=r"data\.path="):
        find_files("data.path", value)


def test_the_command_line_and_experiment_files_are_checked_at_the_start() -> None:
    with pytest.raises(UserError, match=r"^paths\.runs='a\\udcffb': is no path"):
        compose("train", TrainConfig, ["paths.runs=a\udcffb"])
    with pytest.raises(UserError, match=r"^paths\.runs='': is empty"):
        compose("train", TrainConfig, ["paths.runs="])
    Path("mine.yaml").write_text(r'shared: {data: python_docs, paths.cache: "a\ud800b"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"paths\.cache='a\\ud800b': is no path: .*mine\.yaml"):
        compose_step("train", "base", TrainConfig, ["stage=base", "experiment=mine.yaml"])
    with pytest.raises(UserError, match=r"experiment='~nosuchuser/x\.yaml': there is no home folder"):
        compose_step("train", "base", TrainConfig, ["stage=base", "experiment=~nosuchuser/x.yaml"])


def test_a_pattern_is_kept_as_it_was_typed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The home folder of whoever goes on with the run may be another one."""
    monkeypatch.setenv("HOME", str(here))
    (here / "a.txt").write_text("text", encoding="utf-8")
    assert compose("train", TrainConfig, ["data=local", "data.path=~/*.txt"]).config.data.path == "~/*.txt"
    assert list(find_files("data.path", "~/*.txt").files.values()) == [here / "a.txt"]
