"""The command as a person meets it: commands, help, exit codes, and no traceback for a mistake."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import pytest

from nanochat_pl.cli import main as main_module
from nanochat_pl.cli.main import COMMANDS, main
from nanochat_pl.common.wait_policy import wait_policy
from tests.helpers.forked import run_forked

ROOT = Path(__file__).resolve().parents[2]


def test_alone_it_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {command} " in shown for command in COMMANDS)


def test_help_loads_no_large_package() -> None:
    """The seconds it takes are measured by benchmarks/bench_startup.py."""
    program = (
        "import sys; from nanochat_pl.cli.main import main; main(['--help']);"
        "large = {'torch', 'lightning', 'hydra', 'omegaconf', 'numpy', 'yaml'};"
        "print(sorted(large & sys.modules.keys()), file=sys.stderr)"
    )
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert shown.stderr == "[]\n"


WRONG = ["max_steps=few", "seed=-1"]
SAID = ["max_steps='few': must be a whole number.", "seed=-1: is below 0.", "modl: there is no such key; did you mean"]


def test_mistakes_are_told_without_loading_large_libraries() -> None:
    """A person waits for it: torch takes two seconds, Lightning three, SciPy half of one."""
    of_keys = [
        (["train", "modl=1", *WRONG], SAID),
        (["train", "experiment=tiny", "stage=sft", "modl=1", *WRONG], SAID),
        (
            ["train", "data=local", "data.path=no_such_file.txt"],
            ["data.path='no_such_file.txt': there is no such file"],
        ),
        (["pipeline", "experiment=tiny", "stages.base.modl=1", *WRONG], [*SAID[:2], f"stages.base.{SAID[2]}"]),
        (["plan", "modl=1", *WRONG], SAID),
    ]
    needed = {"search": ["model.depth=2,4"], "pipeline": ["experiment=tiny"], "download": ["data=climbmix"]}
    of_keys += [([command, *needed.get(command, []), "modl=1"], ["modl: "]) for command in COMMANDS]
    program = """
import contextlib, io, json, sys
from nanochat_pl.cli.main import main
found = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as told:
        found.append((main(arguments), [line for line in told.getvalue().splitlines() if line.startswith("error: ")]))
    if loaded := {"torch", "lightning", "scipy", "torchmetrics", "transformers"} & {*sys.modules}:
        sys.exit(f"{' '.join(arguments)} loads {sorted(loaded)}")
print(json.dumps(found))
"""
    command = [sys.executable, "-c", program, json.dumps([arguments for arguments, _ in of_keys])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for (arguments, said), (code, errors) in zip(of_keys, found, strict=True):
        assert code == 2 and len(errors) == len(said), (arguments, errors)
        assert all(line.startswith(f"error: {text}") for line, text in zip(errors, said, strict=True)), errors


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_its_keys(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"nanochat-pl {command}" in shown
    assert "paths" in shown


def test_help_of_a_group_shows_all_of_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help", "model"]) == 0
    shown = capsys.readouterr().out
    assert "model.window_pattern=SSSL" in shown
    assert "choices: nanochat, nanochat_2025_10, nanochat_2026_02, tiny" in shown
    assert "--help model.init" in shown
    assert main(["train", "--help", "modle"]) == 2
    assert "did you mean model?" in capsys.readouterr().err


def test_help_shows_the_data_that_is_trained_on_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    """It showed python_docs, where --cfg job shows auto."""
    assert main(["train", "--help", "data"]) == 0
    assert "data.name=auto " in capsys.readouterr().out


def test_help_shows_numbers_as_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """0.0 was shown as false and 1 as true, since they are equal."""
    assert main(["train", "--help", "model.init", "trainer"]) == 0
    shown = capsys.readouterr().out
    assert "model.init.smear=0.0 " in shown
    assert "trainer.log_every_steps=1 " in shown and "trainer.deterministic=false " in shown


def test_help_of_a_group_shows_what_is_there_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    """The tasks of ChatCORE, which a factory makes, were shown as null."""
    assert main(["evaluate", "--help", "chatcore", "chatcore.gsm8k"]) == 0
    shown = capsys.readouterr().out
    for name in ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval"):
        assert f"chatcore.{name}={{}} " in shown
    assert "chatcore.spelling_bee=null " in shown and "chatcore.conversations={} " in shown
    assert "chatcore.gsm8k.recompute=false " in shown
    assert main(["train", "--help", "mixture.tasks", "mixture.tasks.conversations", "model"]) == 0
    shown = capsys.readouterr().out
    assert "mixture.tasks.arithmetic={} " in shown and "mixture.tasks.mmlu=null " in shown
    assert "mixture.tasks.conversations.NAME.start=0 " in shown


def test_the_verbs_name_every_stage_and_suite() -> None:
    from nanochat_pl.cli.evaluate_settings import Suite
    from nanochat_pl.common.run_dir import STAGES
    from nanochat_pl.config import config_dir

    stages = [stage for stage in STAGES if stage in config_dir.groups()["stage"]]
    assert f"stage={'|'.join(stages)}" in COMMANDS["train"]
    assert stages[0] == "tokenizer" and stages[-1] == "rl"  # neither has rows to look at before it is trained
    assert f"stage={'|'.join(stages[1:-1])}" in COMMANDS["doctor"]
    assert all(suite in COMMANDS["evaluate"] for suite in get_args(Suite))


def test_mistakes_give_exit_code_2_and_plain_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "model.dpeth=4", "stage=bsae"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "error: stage=bsae: there is no such choice; did you mean base? There are: base, mid, rl, sft, tokenizer.",
        "error: model.dpeth: there is no such key; did you mean model.depth?",
        "Keys and their meaning: nanochat-pl train --help",
    ]


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "'trian': there is no such command; did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["chat", "run=x"], "run=x: there is no such run in runs; there are no runs yet"),
        (["chat"], "runs: there are no runs."),
        (["chat", "bundle=nowhere"], "bundle=nowhere: there is no such folder."),
        (["chat", "bundle=nowhere", "run=x"], "bundle: names a model by itself"),
        (["evaluate", "bundle=nowhere"], "to: is missing"),
        (["report", "run=../x"], "run='../x': is not a valid run name."),
        (["runs", "delete=x"], "delete=x: there is no such run in runs"),
        (["train", "stage=[base]"], "must be the name of one stage"),
        (["train", "stage=sft"], "runs: no run has a finished stage base."),
        (["train", "stage=base", "paths.runs=file/runs"], "Not a directory"),
        (["chat", "prompt=What", "is", "12"], 'error: is: put quotes around text with blanks: prompt="…"\n'),
        (["chat", "run="], "run='': is not a valid run name."),
        (["evaluate", "run="], "run='': is not a valid run name."),
        (["report", "run="], "run='': is not a valid run name."),
        (["train", "run="], "run='': is not a valid run name."),
        (["pipeline", "experiment=tiny", "run="], "run='': is not a valid run name."),
        (["train", "run="], "Use letters, digits and"),
        (["train", "run=a b"], "run='a b': is not a valid run name."),
        (["pipeline", "experiment=tiny", "paths.runs=file/runs"], "Not a directory"),
        (["plan", "explain=nothing"], "there is no value 'nothing'"),
        (["train", "-m", "model.depth=3"], "-m: no key has several values."),
    ],
)
def test_missing_things_are_said_before_any_work(
    arguments: list[str], expected: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "file").touch()
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert expected in err
    assert "Traceback" not in err + out


def test_ctrl_c_and_bugs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> Any:
        def dispatch(arguments: list[str]) -> int:
            raise error

        return dispatch

    monkeypatch.setattr(main_module, "_dispatch", raising(KeyboardInterrupt()))
    assert main([]) == 130
    monkeypatch.setattr(main_module, "_dispatch", raising(ZeroDivisionError("x")))
    assert main([]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "This is a bug in nanochat_pl" in err


def test_a_terminal_that_lacks_signs_gets_question_marks() -> None:
    """A pipe with another encoding than UTF-8 ended the listing of the commands with a traceback."""
    command = [sys.executable, "-m", "nanochat_pl.cli.main"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    assert b"nanochat-pl <command> key=value ?" in done.stdout


def test_only_base_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "stage=sft"]) == 2
    assert "only base is planned" in capsys.readouterr().err


def test_ctrl_c_while_the_libraries_are_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch swallowed it, and the command ran on; or numpy was left half loaded, which looked like a bug of ours."""

    def load(name: str) -> Any:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        return None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(main_module.importlib, "import_module", load)
        assert main(["runs"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Stopped." in capsys.readouterr().err


def test_train_py_is_the_train_verb(here: Path) -> None:
    done = run_forked([str(ROOT / "train.py"), "stage=base", "model.depth=4", "check_only=true"])
    assert done.returncode == 0 and "nothing was trained" in done.stdout, done.stderr
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "platform", "expected"),
    [
        ({}, "linux", "expandable_segments:True"),
        ({}, "darwin", None),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "linux", "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, "linux", None),
        ({"PYTORCH_HIP_ALLOC_CONF": "backend:native"}, "linux", None),
    ],
)
def test_gpu_memory_may_grow_unless_the_person_has_said_otherwise(
    given: dict[str, str], platform: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", given)
    monkeypatch.setattr(sys, "platform", platform)
    main_module._let_gpu_memory_grow()
    assert given.get("PYTORCH_ALLOC_CONF") == expected


def test_threads_wait_briefly_unless_the_person_has_said_how() -> None:
    assert wait_policy({}) == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
    assert wait_policy({"OMP_WAIT_POLICY": "ACTIVE"}) == {}
    assert wait_policy({"GOMP_SPINCOUNT": "10"}) == {}
