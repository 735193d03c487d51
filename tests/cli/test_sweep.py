"""Sweeps: jobs, their names, and what happens when one fails."""

from __future__ import annotations

import io
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nanochat_pl.cli import _sweep, _sweep_state
from nanochat_pl.cli._subprocess import is_stop
from nanochat_pl.cli.train import compose_train
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import write_json
from nanochat_pl.common.run_dir import stage_folder
from nanochat_pl.config import hydra_app
from tests.cli.conftest import pretend_finished
from tests.helpers.sweeps import jobs_of as expand


def run_sweep(command: str, arguments: Sequence[str]) -> int:
    return _sweep.run_sweep(command, hydra_app.parse(["-m", *arguments]))


def names(*arguments: str) -> list[str]:
    return [job.name for job in expand(arguments)]


def test_jobs_are_the_product_of_the_values() -> None:
    jobs = expand(["model.depth=2,3", "optim.matrix_lr=choice(0.1,0.2)", "seed=7", "run=x"])
    assert [job.name for job in jobs] == [
        "x-depth2-matrix_lr0.1",
        "x-depth2-matrix_lr0.2",
        "x-depth3-matrix_lr0.1",
        "x-depth3-matrix_lr0.2",
    ]
    config = compose_train(jobs[3].overrides).config
    assert (config.model.depth, config.optim.matrix_lr, config.seed, config.run) == (3, 0.2, 7, jobs[3].name)


def test_names_without_a_run_say_the_depth_once() -> None:
    assert names("model.depth=range(2,4)") == ["d2", "d3"]
    assert names("flops_budget=2e10,2.5e18") == ["d12-flops_budget2e+10", "d12-flops_budget2.5e+18"]
    assert names("seed=1,2", "model=tiny") == ["d4-seed1", "d4-seed2"]
    assert names("model=nanochat,tiny", "experiment=tiny") == ["tiny-modelnanochat", "tiny-modeltiny"]
    assert names("model=glob(nano*,exclude=*_*)", "seed=1") == ["d12-modelnanochat"]
    assert names("evaluation.sample_prompts=['a b'],[c]") == ["d12-sample_prompts_a_b_", "d12-sample_prompts_c_"]


def test_a_stage_that_builds_on_another_is_swept_by_its_pipeline(here: Path) -> None:
    with pytest.raises(UserError, match="sweep over a pipeline"):
        expand(["stage=sft", "optim.matrix_lr=0.1,0.2"])
    jobs = expand(["experiment=tiny", "stages.sft.optim.matrix_lr=0.1,0.2"], "pipeline")
    assert [job.name for job in jobs] == ["tiny-matrix_lr0.1", "tiny-matrix_lr0.2"]
    assert jobs[0].overrides == ("experiment=tiny", "stages.sft.optim.matrix_lr=0.1", f"run={jobs[0].name}")


def test_text_is_swept_over_as_hydra_reads_it(here: Path) -> None:
    jobs = expand(["data=local", "data.path=a,'b c','d,e'", "data.text_column='x,y'"])
    assert [job.name for job in jobs] == ["d12-patha", "d12-pathb_c", "d12-pathd_e"]
    assert compose_train(jobs[2].overrides).config.data.path == "d,e"
    assert compose_train(jobs[1].overrides).config.data.text_column == "x,y"
    assert names("run=a,b", "model=tiny") == ["a", "b"]


def test_experiments_are_swept_over(here: Path) -> None:
    (here / "mine.yaml").write_text("# @package _global_\nmodel: {depth: 3}\nmax_steps: 5\n", encoding="utf-8")
    assert names("experiment=tiny,demo", "seed=1,2") == ["tiny-seed1", "tiny-seed2", "demo-seed1", "demo-seed2"]
    jobs = expand(["experiment=mine.yaml", "seed=1,2"])
    assert jobs[1].overrides == ("experiment=mine.yaml", "seed=2", "run=mine-seed2")


def test_a_sweep_without_several_values() -> None:
    with pytest.raises(UserError, match="-m: no key has several values"):
        expand(["data=local", "model.depth=2"])


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("optim.matrix_lr=interval(0.01,0.02)", "does not support sweep type"),
        ("seed=1,1", "several jobs would be named d12-seed1"),
        ("seed=range(0,1000000000)", "makes more than 1,000 jobs"),
        ("seed=[1,2", "no viable alternative"),
    ],
)
def test_sweeps_that_make_no_sense(argument: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        expand([argument])


def test_all_jobs_are_checked_before_the_first_begins(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sweep, "run_child", lambda arguments, *rest: pytest.fail("began"))
    with pytest.raises(UserError) as caught:
        run_sweep("train", ["model.depth=2,0", "model.dpeth=3"])
    assert any("is below 1" in problem for problem in caught.value.problems)
    assert any("dpeth" in problem for problem in caught.value.problems)


def test_files_that_are_not_there_are_told_before_the_first_job_begins(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sweep, "run_child", lambda arguments, *rest: pytest.fail("began"))
    (here / "there.txt").write_text("words\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        run_sweep("train", ["data=local", "data.path=there.txt,'gone*.txt',away", "model.depth=2,3"])
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == [
        "data.path='gone*.txt'",
        "data.path='away'",
    ]
    keys = ["experiment=tiny", "stages.sft.mixture.tasks.conversations.mine.path=chats,others"]
    with pytest.raises(UserError, match=r"mixture\.tasks\.conversations\.mine\.path='chats': there is no such file"):
        run_sweep("pipeline", keys)


def test_finished_jobs_are_skipped_and_failing_ones_do_not_stop_the_others(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_finished("model.depth=2", "run=d2")
    started = []

    def fake(arguments: list[str], *rest: Any) -> int:
        started.append(arguments[-1])
        return 2 if arguments[-1] == "run=d3" else 0

    monkeypatch.setattr(_sweep, "run_child", fake)
    assert run_sweep("train", ["model.depth=2,3,4"]) == 2
    assert started == ["run=d3", "run=d4"]
    shown = capsys.readouterr().out
    for line in ("d2   base   finished before", "d3          failed, exit code 2", "d4          finished"):
        assert line in shown


def test_a_job_that_is_killed_ends_alone_and_the_table_has_the_figures(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(arguments: list[str], *rest: Any) -> int:
        if arguments[-1] == "run=d2":
            return 128 + signal.SIGKILL
        folder = pretend_finished(*arguments[1:])
        finished = {"step": 1, "metrics": {"val/bpb": 1.25}, "seconds": 75.0, "tokens": 12345}
        write_json(folder.path / "finished.json", finished)
        return 0

    monkeypatch.setattr(_sweep, "run_child", fake)
    assert run_sweep("train", ["model.depth=2,3"]) == 128 + signal.SIGKILL
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("d2: killed, SIGKILL (out of memory?). The end of ")
    table = [line.split() for line in lines[-4:-1]]
    assert table[0] == ["job", "stage", "outcome", "val/bpb", "tokens", "time"]
    assert table[1] == ["d2", "killed,", "SIGKILL", "(out", "of", "memory?)"]
    assert table[2] == ["d3", "base", "finished", "1.2500", "12,345", "1", "min", "15", "s"]


@pytest.mark.slow
def test_the_table_of_swept_pipelines_has_their_stages(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(arguments: list[str], *rest: Any) -> int:
        run = next(text for text in arguments if text.startswith("run="))
        pretend_finished("experiment=tiny", "stage=base", run)
        return 5 if run.endswith("0.2") else 0

    monkeypatch.setattr(_sweep, "run_child", fake)
    assert run_sweep("pipeline", ["experiment=tiny", "stages.sft.optim.matrix_lr=0.1,0.2"]) == 5
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[-4:-1]]
    assert rows == [
        "tiny-matrix_lr0.1 base finished 1.0 s",
        "tiny-matrix_lr0.2 failed, exit code 5",
        "tiny-matrix_lr0.2 base finished 1.0 s",
    ]


def test_a_job_that_was_begun_under_other_settings_is_not_called_finished(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_finished("model.depth=2", "max_steps=10", "run=d2")
    monkeypatch.setattr(_sweep, "run_child", lambda arguments, *rest: pytest.fail("began"))
    with pytest.raises(UserError, match="max_steps=20: runs/d2/base was begun with max_steps=10"):
        run_sweep("train", ["model.depth=2,3", "max_steps=20"])


def test_a_signal_ends_the_sweep(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(_sweep, "run_child", lambda arguments, *rest: started.append(arguments) or 130)
    assert run_sweep("train", ["model.depth=2,3"]) == 130
    assert len(started) == 1
    assert [code for code in (0, 2, 129, 130, 134, 137, 139, 143) if is_stop(code)] == [129, 130, 143]


@pytest.mark.slow
def test_numbers_are_kept(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the same command, with a value more, and with one less; another sweep has its own."""
    monkeypatch.setattr(_sweep, "run_child", lambda *rest: 0)

    def numbers(*arguments: str) -> list[str]:
        assert run_sweep("train", arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        return [line.partition(",")[0] for line in lines if line.startswith("job ") and "its log is" in line]

    first = ["job 1: d12-seed0", "job 2: d12-seed1"]
    assert numbers("seed=0,1") == first
    assert numbers("seed=1,2,0", "max_steps=7") == [first[1], "job 3: d12-seed2", first[0]]
    assert numbers("run=x", "seed=2,1")[0] == "job 1: x-seed2"


def test_a_job_that_fails_is_named_with_what_it_said(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(arguments: list[str], parent: int | None, log: Path) -> int:
        log.write_text("".join(f"line {n}\n\n" for n in range(100)) + "error: it was so\n", encoding="utf-8")
        return 2 if arguments[-1] == "run=d3" else 0

    monkeypatch.setattr(_sweep, "run_child", fake)
    assert run_sweep("train", ["model.depth=2,3,4"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert "job 2: failed, exit code 2; 1 of 3 done, 1 failed, about 0.0 s left" in lines
    assert "job 3: finished; 2 of 3 done, 1 failed" in lines
    at = next(n for n, line in enumerate(lines) if line.startswith("d3: failed, exit code 2. The end of "))
    assert lines[at].endswith("002-d3.log:")
    assert lines[at + 1 :] == [*(f"  line {n}" for n in range(93, 100)), "  error: it was so"]


def test_what_a_sweep_that_was_killed_left_is_removed(here: Path) -> None:
    with _sweep_state.session(here) as one:
        (old := here / "session-old").mkdir()
        assert one.is_dir()
    with _sweep_state.session(here):
        assert not old.exists() and not one.exists()


def test_how_far_a_sweep_is() -> None:
    ended = [{"code": code, "seconds": seconds} for code, seconds in ((0, 60.0), (0, 0.0), (1, 900.0))]
    assert _sweep_state.summary([*ended, {}], 6) == "2 of 6 done, 1 failed, 1 running, about 2 min 30 s left"
    assert _sweep_state.summary(ended, None) == "2 done, 1 failed"
    stopped = [*ended, {"code": 143, "word": "stopped", "seconds": 5.0}]
    assert _sweep_state.summary(stopped, 6) == "2 of 6 done, 1 failed, 1 stopped", "what was stopped has not failed"


def test_the_live_table_has_what_is_running_and_what_failed(here: Path) -> None:
    states = here / "states"
    states.mkdir()
    folder = {"runs": str(here / "runs"), "run": "d2", "stage": "base"}
    (base := here / "runs" / "d2" / "base").mkdir(parents=True)
    write_json(base / "plan.json", {"num_steps": {"value": 150}})
    (base / "metrics.csv").write_text("step,train/loss\n57,2.5\n", encoding="utf-8")
    for number in range(1, 40):
        state: dict[str, Any] = {
            "number": number,
            "name": f"n{number}",
            "begun": time.time() + number,
            "folders": [folder],
        }
        ended = {"code": number == 3, "word": "failed" if number == 3 else "finished", "seconds": 60.0}
        _sweep_state.write_state(states, number, state | ({} if number == 2 else ended))
    table = _sweep_state._table(states, 50)
    with io.StringIO() as file:
        Console(file=file, width=100).print(table)
        lines = [line.split() for line in file.getvalue().splitlines()]
    assert " ".join(lines[0]) == "37 of 50 done, 1 failed, 1 running, about 11 min 30 s left"
    assert lines[2][:4] == ["2", "n2", "running", "57/150"] and lines[3][:3] == ["3", "n3", "failed"]
    assert len(lines) == 2 + _sweep_state.MAX_ROWS and lines[-1][1] == "n39"


def test_a_pipeline_begun_under_other_settings_is_refused_before_the_first_begins(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_finished("experiment=tiny", "stage=base", "run=tiny-matrix_lr0.1")
    monkeypatch.setattr(_sweep, "run_child", lambda *rest: pytest.fail("began"))
    with pytest.raises(UserError, match=r"max_steps=20: runs/tiny-matrix_lr0\.1/base was begun with max_steps=10"):
        run_sweep("pipeline", ["experiment=tiny", "stages.sft.optim.matrix_lr=0.1,0.2", "max_steps=20"])


def test_a_training_that_is_about_to_end_is_waited_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that was killed and run again at once found its runs in use."""
    held, slept = iter([True, True, False]), []
    monkeypatch.setattr(_sweep_state, "is_held", lambda folder: next(held))
    monkeypatch.setattr(_sweep_state.time, "sleep", slept.append)
    _sweep_state.wait_until_free([stage_folder(here, "d2", "base")])
    assert len(slept) == 2
