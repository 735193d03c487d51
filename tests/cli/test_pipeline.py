"""Pipelines: which key goes to which step, what is skipped, and children that end when they should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat_pl.cli import pipeline, train
from nanochat_pl.cli.evaluate_settings import EvaluateConfig, asked, places
from nanochat_pl.cli.pipeline import check_all, is_finished, steps_of
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import write_json
from nanochat_pl.common.run_dir import stage_folder
from nanochat_pl.config.compose import Composed
from nanochat_pl.config.experiment import compose_step
from nanochat_pl.evaluation.results import METRICS_VERSION
from tests.cli.conftest import pretend_finished

STAGES = ("tokenizer", "base", "mid", "sft", "rl")


def test_keys_go_to_the_steps_that_have_them() -> None:
    steps = {
        s.name: s.overrides
        for s in steps_of(["experiment=tiny", "model.depth=3", "run=x", "stages.base.seed=5", "limit=2"])
    }
    assert steps["base"] == ("experiment=tiny", "stage=base", "model.depth=3", "run=x", "seed=5")
    assert steps["mid"] == ("experiment=tiny", "stage=mid", "model.depth=3", "run=x")
    assert steps["sft"] == ("experiment=tiny", "stage=sft", "model.depth=3", "run=x")
    assert steps["evaluate"] == ("experiment=tiny", "run=x", "limit=2")
    assert steps["report"] == ("experiment=tiny", "run=x")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("foo.bar=3", "foo.bar: no step of the pipeline has such a key."),
        ("stages.bsae.max_steps=3", "stages.bsae: is no step of the pipeline; did you mean base?"),
        ("stages.base=3", "stages.base=3: is not of the form stages.STEP.KEY"),
        ("stage=base", "stage=base: a pipeline has its stages from the experiment"),
        ("nonsense", "nonsense: is not of the form key=value."),
    ],
)
def test_keys_that_no_step_takes(override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        steps_of(["experiment=tiny", override])
    assert caught.value.problems[0].startswith(expected)


def test_what_is_wrong_with_a_key_of_one_step_is_told_as_it_was_typed() -> None:
    typed = ["stages.base.model.depht=3", "stages.sft.max_steps=abc", "model.sequence_len=-1"]
    typed += ["stages.sft.optim={matrix_lrr:1}", "~stages.sft.model.dept"]
    with pytest.raises(UserError) as caught:
        check_all(steps_of(["experiment=tiny", *typed]))
    begin = {problem.split(":")[0] for problem in caught.value.problems}
    assert begin == {
        "stages.base.model.depht",
        "stages.sft.max_steps='abc'",
        "model.sequence_len=-1",
        "stages.sft.optim.matrix_lrr",
        "~stages.sft.model.dept",
    }


def test_words_behind_a_text_are_the_rest_of_it() -> None:
    with pytest.raises(UserError) as caught:
        steps_of(["experiment=tiny", "run=demo", "hi", "there"])
    assert caught.value.problems == ('hi: put quotes around text with blanks: run="…"',)


def test_an_experiment_is_needed() -> None:
    with pytest.raises(UserError, match="experiment: is missing"):
        steps_of(["run=x"])


def test_finished_steps_are_skipped_and_newer_inputs_make_them_again(here: Path) -> None:
    steps = steps_of(["experiment=tiny"])
    composed = check_all(steps)
    run_dir = Path("runs/tiny")

    def finished() -> list[bool]:
        return [is_finished(step, checked, run_dir) for step, checked in zip(steps, composed, strict=True)]

    assert not any(is_finished(*pair, run_dir) for pair in zip(steps[:5], composed[:5], strict=True))
    for stage in STAGES:
        pretend_finished("experiment=tiny", f"stage={stage}")
    assert finished() == [*[True] * 5, False, False]
    pretend_measured(composed[5])
    write_json(run_dir / "report" / "report.json", {})
    assert finished() == [True] * 7
    later = time.time() + 10
    for file in ("finished.json", "bundle/stage.json"):
        os.utime(run_dir / "rl" / file, (later, later))
    assert finished() == [*[True] * 5, False, False]


def pretend_measured(composed: Composed[EvaluateConfig]) -> None:
    _, to = places(composed.config, composed.experiment)
    write_json(to / "results.json", {"settings": asked(composed.config), "version": METRICS_VERSION, "suites": {}})


def test_other_questions_are_asked_anew(here: Path) -> None:
    """evaluate was "finished before" whatever its keys, and whichever stage had been measured."""
    for stage in ("base", "sft"):
        pretend_finished("experiment=tiny", f"stage={stage}")
    steps = {step.name: step for step in steps_of(["experiment=tiny"])}
    pretend_measured(steps["evaluate"].compose())

    def is_measured(*overrides: str) -> bool:
        step = next(step for step in steps_of(["experiment=tiny", *overrides]) if step.name == "evaluate")
        return is_finished(step, step.compose(), Path("runs/tiny"))

    assert is_measured()
    assert is_measured("batch_size=3", "accelerator=cpu")
    assert not is_measured("limit=50")
    assert not is_measured("stages.evaluate.stage=base")


def test_a_run_begun_anew_is_one_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each step looked for a free name of its own: sft of demo-2 started from the base of demo."""
    for stage in STAGES:
        pretend_finished("experiment=tiny", f"stage={stage}")
    places: list[str] = []

    def fake(arguments: list[str]) -> int:
        if arguments[0] == "train":
            places.append(str(pretend_finished(*arguments[1:]).path))
        else:
            config = compose_step(arguments[0], arguments[0], EvaluateConfig, arguments[1:]).config
            places.append(f"{config.run}/{arguments[0]}")
        return 0 if len(places) < 6 else 130

    monkeypatch.setattr(pipeline, "run_child", fake)
    assert pipeline.run(["experiment=tiny", "resume=never", "max_steps=3"]) == 130
    assert capsys.readouterr().out.startswith("New run: tiny-2.\n")
    assert places == [f"runs/tiny-2/{stage}" for stage in STAGES] + ["tiny-2/evaluate"]
    assert stage_folder(Path("runs"), "tiny-2", "sft").parent("base").run == "tiny-2"


def test_a_finished_stage_with_other_settings_is_another_run(here: Path) -> None:
    pretend_finished("experiment=tiny", "stage=base")
    step = steps_of(["experiment=tiny", "seed=7", "trainer.num_threads=1"])[1]
    with pytest.raises(UserError) as caught:
        is_finished(step, step.compose(), Path("runs/tiny"))
    assert caught.value.problems == ("seed=7: runs/tiny/base was begun with seed=42.",)


def test_the_first_failing_step_ends_the_pipeline(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def fake(arguments: list[str]) -> int:
        started.append(arguments[0] if arguments[0] != "train" else arguments[2])
        return 5 if "stage=base" in arguments else 0

    monkeypatch.setattr(pipeline, "run_child", fake)
    assert pipeline.run(["experiment=tiny"]) == 5
    assert started == ["stage=tokenizer", "stage=base"]


def test_files_of_any_stage_that_are_not_there_are_told_before_the_first_step(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stage that was to read them told it, after those before it had been trained."""
    monkeypatch.setattr(pipeline, "run_child", lambda arguments: pytest.fail("began"))
    with pytest.raises(UserError) as caught:
        pipeline.run(["experiment=tiny", "stages.sft.mixture.tasks.conversations.mine.path=gone.jsonl"])
    (problem,) = caught.value.problems
    assert problem.startswith("mixture.tasks.conversations.mine.path='gone.jsonl': there is no such file or folder")
    assert capsys.readouterr().out == "" and not (here / "runs").exists()


def test_a_pipeline_is_checked_before_anything_of_it_is_there(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ended with "there is no such run": evaluate was to read what nobody had trained."""
    monkeypatch.setattr(pipeline, "run_child", lambda arguments: train.run(arguments[1:]))
    assert pipeline.run(["experiment=tiny", "check_only=true"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("check_only=true: the settings are right; nothing was trained.") == 5
    assert "come from runs/tiny/mid, which is not finished yet." in shown and "evaluate:\n" in shown
    assert not (here / "runs").exists()
    with pytest.raises(UserError, match="above"):
        pipeline.run(["experiment=tiny", "check_only=true", "stages.evaluate.temperature=11"])


def test_a_child_that_is_killed_after_a_signal_counts_as_stopped(tmp_path: Path) -> None:
    program = """
signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
print("ready", flush=True)
time.sleep(30)
"""
    parent = parent_of(program, tmp_path)
    assert first_line(parent) == "ready"
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=20) == 128 + signal.SIGTERM


CHILD = """
import signal, sys
from nanochat_pl.cli import _subprocess
signal.signal(signal.SIGINT, signal.{sigint})
_subprocess.sys.executable = {executable!r}
sys.exit(_subprocess.run_child(["x"]))
"""


def parent_of(program: str, folder: Path, sigint: str = "default_int_handler") -> subprocess.Popen[str]:
    """A process that runs `run_child`; the child is a script of ours in Python's place."""
    script = folder / "child.py"
    script.write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time\nfrom nanochat_pl.cli import main\n{program}",
        encoding="utf-8",
    )
    script.chmod(0o755)
    command = [sys.executable, "-c", CHILD.format(executable=str(script), sigint=sigint)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_once_and_the_exit_code_comes_back(tmp_path: Path, number: int) -> None:
    program = """
def stop(number, frame):
    print("got", number, flush=True)
    time.sleep(0.2)
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
print("ready", flush=True)
time.sleep(30)
"""
    parent = parent_of(program, tmp_path)
    assert first_line(parent) == "ready"
    parent.send_signal(number)
    assert parent.communicate(timeout=20)[0].split() == ["got", str(number)]
    assert parent.returncode == 128 + number


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """A pipeline under nohup ended with its terminal."""
    program = """
print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, flush=True)
time.sleep(0.5)
"""
    parent = parent_of(program, tmp_path, sigint="SIG_IGN")
    assert first_line(parent) == "True"
    parent.send_signal(signal.SIGINT)
    parent.communicate(timeout=20)
    assert parent.returncode == 0


def test_a_child_that_a_signal_ended_gives_128_and_its_number(tmp_path: Path) -> None:
    parent = parent_of("os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    parent.communicate(timeout=20)
    assert parent.returncode == 128 + signal.SIGKILL


def test_a_child_stops_when_its_parent_is_killed(tmp_path: Path) -> None:
    program = """
main._stop_with_parent()
signal.signal(signal.SIGTERM, lambda *_: (print("stopping", flush=True), sys.exit(0)))
print("ready", flush=True)
time.sleep(30)
"""
    parent = parent_of(program, tmp_path)
    assert first_line(parent) == "ready"
    parent.kill()
    assert first_line(parent) == "stopping"
    parent.wait(timeout=20)
