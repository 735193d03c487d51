"""What a launcher says of a process: read with care, since pods and job scripts set the same variables."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.launch_env import ALONE, LaunchEnv, launch_env, master_address

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID")


def set_to(variables: Mapping[str, str], patch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, *LAUNCHERS):
        patch.delenv(name, raising=False)
    for name, value in variables.items():
        patch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, ALONE),
        ({"WORLD_SIZE": "1", "RANK": "none"}, ALONE),
        ({"WORLD_SIZE": "2", "RANK": "1"}, LaunchEnv(1, 2, 1, 2)),
        ({"WORLD_SIZE": "2", "NODE_RANK": "0", "LOCAL_RANK": "1"}, LaunchEnv(1, 2, 1, 2)),  # of a Trainer's own start
        ({"WORLD_SIZE": "16", "RANK": "9", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}, LaunchEnv(9, 16, 1, 8)),
    ],
)
def test_place(variables: dict[str, str], place: LaunchEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to(variables, monkeypatch)
    assert launch_env() == place


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' must be one whole number from 1 "),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' must be"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' must be"),
        ({"WORLD_SIZE": "1_0"}, "WORLD_SIZE='1_0' must be"),
        ({"WORLD_SIZE": "2"}, "RANK is missing: it must be one whole number from 0 to 1, and WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": ""}, "RANK='' must be"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK='2' must be one whole number from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK='-1' must be"),
        ({"WORLD_SIZE": "4", "RANK": "1", "LOCAL_WORLD_SIZE": "8,4"}, "LOCAL_WORLD_SIZE='8,4' must be one whole"),
        ({"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK='2' must be"),
        ({"WORLD_SIZE": "4", "RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is missing"),
    ],
)
def test_a_place_that_is_none(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the variable, and no traceback."""
    set_to(variables, monkeypatch)
    assert main(["train"]) == 2
    err = capsys.readouterr().err
    assert said in err.splitlines()[0] and "unset WORLD_SIZE" in err and "bug" not in err and len(err.splitlines()) == 2


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "MASTER_ADDR is missing, and WORLD_SIZE=2"),
        ({"MASTER_ADDR": " "}, "MASTER_ADDR is missing"),
        ({"MASTER_ADDR": "a"}, "MASTER_PORT is missing"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "MASTER_PORT='70000' must be one whole number from 1 to 65535"),
    ],
)
def test_a_meeting_point_that_is_none(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_to({"WORLD_SIZE": "2", "RANK": "0", **variables}, monkeypatch)
    with pytest.raises(UserError, match=said):
        master_address()
    assert main(["train"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], [], ["train", "--help"]])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_asked_alone_waits_for_nobody(
    arguments: list[str], rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The variables of a pod: no other process will ever come."""
    set_to({"WORLD_SIZE": "2", "RANK": str(rank)}, monkeypatch)
    assert main(arguments) == 0
    assert "nanochat-pl" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["plan"], ["pipeline", "experiment=demo"], ["train", "-m", "max_steps=1,2"]])
@pytest.mark.parametrize("launcher", ["", *LAUNCHERS])
def test_what_one_process_does_is_refused_to_several(
    arguments: list[str], launcher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the first of a launch, while the others end without an error: a launcher that sees one kills the first."""
    for rank, speaks in ((0, True), (1, not launcher)):
        set_to({"WORLD_SIZE": "2", "RANK": str(rank), **({launcher: "7"} if launcher else {})}, monkeypatch)
        code = main(arguments)
        out, err = capsys.readouterr()
        assert (code, out) == (2 if speaks else 0, "")
        assert err.count("error: ") == err.count("was started 2 times at once") == err.count("unset it") == speaks
