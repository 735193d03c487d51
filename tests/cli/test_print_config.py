"""`--cfg job`, as any program of Hydra has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nanochat_pl.cli.main import main
from nanochat_pl.cli.train import compose_train


@pytest.mark.parametrize("flag", [["--cfg", "job"], ["-c", "job", "--resolve"], ["--cfg=job"]])
def test_every_value_is_printed_and_nothing_done(
    flag: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["experiment=demo", "stage=sft", "model.depth=6", "data=local", "data.path=my texts"]
    assert main(["train", *flag, *typed]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == yaml.safe_load(yaml.safe_dump(compose_train(typed).plain()))
    assert (
        printed["max_steps"] == 800 and printed["optim"]["matrix_lr"] == 0.012 and printed["data"]["path"] == "my texts"
    )
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("command", ["plan", "doctor", "evaluate", "report", "chat", "runs"])
def test_other_commands_too(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--cfg", "job", "paths.runs=mine"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["paths"]["runs"] == "mine"


@pytest.mark.parametrize("flag", [["--cfg", "job"], ["--cfg=job"]])
def test_one_of_several_processes_prints_it(
    flag: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for command in ("train", "plan"):
        assert main([command, *flag]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["paths"]["runs"] == "runs"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--cfg", "jobs"], "--cfg: invalid choice: 'jobs'"),
        (["train", "stage=base", "--cfg"], "--cfg: expected one argument"),
        (["train", "--cfg", "job", "--package", "optm"], "--package optm: the configuration has no such group"),
        (["train", "--cfg", "job", "model.dpth=6"], "model.dpth"),
        (["pipeline", "--cfg", "job", "experiment=demo"], "a configuration for each of its steps"),
    ],
)
def test_what_cannot_be_printed(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and captured.out == ""
