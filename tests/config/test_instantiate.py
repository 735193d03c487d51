"""Classes that config files may name, and those that they may not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.common.yaml_files import read_yaml
from nanochat_pl.config import config_dir, instantiate
from nanochat_pl.config.instantiate import make_objects, problems_of_objects

TARGET = "nanochat_pl.training.callbacks.graceful_stop.GracefulStop"


def test_a_class_of_an_allowed_package_is_made() -> None:
    nodes = {"left_out": None, "x": {"_target_": TARGET, "resume_files": "a", "max_seconds": 3.0}}
    assert problems_of_objects(nodes, "callbacks") == []
    made = make_objects(nodes, "callbacks")["callbacks.x"]
    assert (made.resume_files, made.max_seconds) == ("a", 3.0)


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"_target_": "os.system", "command": "true"}, "callbacks.x._target_='os.system': there is no such class"),
        ({"_target_": "builtins.eval"}, "there is no such class"),
        ({"_target_": "nanochat_pl.common.run_dir.os.system"}, "cannot be imported"),
        ({"_target_": "nanochat_pl.common.run_dir.os"}, "there is no such class"),
        ({"_target_": "nanochat_pl.common.files.write_text", "path": "x"}, "there is no such class"),
        ({"_target_": "nanochat_pl.nothing.Here"}, "cannot be imported"),
        ({"_target_": "lightning"}, "has no _target_"),
        ({"_target_": 3}, "has no _target_"),
        ({}, "has no _target_"),
        ("text", "has no _target_"),
        ({"_target_": TARGET, "max_second": 1}, f"{TARGET} takes no such argument; did you mean max_seconds"),
        ({"_target_": TARGET, "max_seconds": 1}, "cannot be made: missing a required argument: 'resume_files'."),
        ({"_target_": "nanochat_pl.common.run_dir.StageFolder"}, "is no Callback of Lightning."),
        ({"_target_": "lightning.pytorch.cli.LightningCLI"}, "is no Callback of Lightning."),
        ({"_target_": "lightning.pytorch.profilers.SimpleProfiler"}, "is no Callback of Lightning."),
        ({"_target_": "torchmetrics.MeanMetric"}, "is no Callback of Lightning."),
        ({"_target_": "lightning.pytorch.loggers.logger.Logger"}, "there is no such class to make objects of"),
        ({"_target_": "lightning." + "a." * 3000 + "B"}, "cannot be imported"),
        ({"_target_": "lightning..pytorch.Callback"}, "cannot be imported"),
        ({"_target_": "nanochat_pl.tools.__main__.main"}, "cannot be imported: it is a program"),
        ({"_target_": "lightning.pytorch.Trainer"}, "is no Callback of Lightning."),
        ({"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "x"}, "is no Callback of Lightning."),
    ],
)
def test_what_is_refused(node: Any, expected: str) -> None:
    (problem,) = problems_of_objects({"x": node}, "callbacks")
    assert problem.startswith("callbacks.x")
    assert expected in problem


def test_a_wrong_class_is_found_before_any_work(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was found after the tokenizer had been trained and the corpus was in tokens."""
    file = "stages: {base: {logger.mine: {_target_: lightning.pytorch.loggers.CSVLoger}, callbacks.it.verbose: true}}"
    (here / "mine.yaml").write_text(f"pipeline: [tokenizer, base]\n{file}\n", encoding="utf-8")
    assert main(["pipeline", "experiment=mine.yaml"]) == 2
    error = capsys.readouterr().err
    assert "error: logger.mine._target_='lightning.pytorch.loggers.CSVLoger': there is no such class." in error
    assert "error: callbacks.it: has no _target_, the dotted name of a class. (mine.yaml, stages.base)" in error
    assert not (here / "runs").exists()


@pytest.mark.slow
def test_settings_are_checked_without_importing_lightning() -> None:
    """It takes seconds, and a person with a wrong key waits for them."""
    code = (
        "import sys; from nanochat_pl.cli.main import main; code = main(['plan', 'model.depth=4', 'hardware=h100']);"
        "print(code, sorted(name for name in sys.modules if name.split('.')[0] == 'lightning'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].endswith(" []"), done.stdout


def test_our_own_logger_that_is_not_looked_at_would_pass() -> None:
    node = read_yaml(config_dir.config_folder() / "logger" / "tensorboard.yaml")["tensorboard"]
    assert instantiate._problems_of_object(node, "logger.tensorboard", "logger") == []
    assert instantiate.problems_of_objects({"tensorboard": {**node, "_target_": "no.Such"}}, "logger") != []
