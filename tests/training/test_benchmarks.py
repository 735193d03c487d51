"""Benchmarks of a model in training: when they are measured, what they leave behind, and what they must not change."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_pl import load_bundle
from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import UserError
from nanochat_pl.distributed import collectives, coordination
from nanochat_pl.evaluation.results import TaskResult, make_result
from nanochat_pl.model.gpt import GPT
from nanochat_pl.tasks.synthetic.arithmetic import Arithmetic
from nanochat_pl.training.callbacks import benchmarks
from nanochat_pl.training.callbacks.benchmarks import Benchmark, BenchmarkCache, columns_of, measure
from nanochat_pl.training.callbacks.graceful_stop import StopRequested
from nanochat_pl.training.module import LMModule
from tests.helpers.faults import MODULE
from tests.helpers.launch import launch
from tests.helpers.processes import run
from tests.helpers.training import fit_tiny, tiny_model
from tests.training.conftest import same_weights, sft_overrides, start_run, tiny_overrides, weights_of

REPOSITORY = Path(__file__).resolve().parents[2]

CHAT = (
    "max_steps=5",
    "evaluation.chat_every_steps=2",
    "evaluation.chat.arithmetic.test_size=9",
    "evaluation.chat.identity={}",
    "evaluation.chat_limit_generative=5",
    "evaluation.chat_max_tokens=8",
    "model.compute_dtype=float32",
)


class Examiner:
    """Tasks whose results are given, and a record of when they were asked."""

    def __init__(self, *outcomes: list[float] | BaseException, every_steps: int = 2) -> None:
        self.outcomes = {f"task{number}": outcome for number, outcome in enumerate(outcomes)}
        self.asked: list[str] = []
        self.training: list[bool] = []
        self.when_asked: Callable[[], None] = lambda: None
        self.benchmark = Benchmark("chat", every_steps, list(self.outcomes), self.measure_task)

    def measure_task(self, name: str, net: GPT, meanwhile: Callable[[], None]) -> TaskResult:
        self.asked.append(name)
        self.when_asked()
        meanwhile()
        self.training.append(net.training)
        outcome = coordination.raise_on_all_ranks(lambda: self._outcome(name))
        return make_result(name, [str(number) for number in range(len(outcome))], outcome, baseline=0.5)

    def _outcome(self, name: str) -> list[float]:
        """What an evaluation finds in its share of the problems."""
        outcome = self.outcomes[name]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_figures_of_a_benchmark() -> None:
    examiner = Examiner([1, 0, 1, 1], [1, 1, 1, 1])
    metrics = measure(examiner.benchmark, GPT(tiny_model()).materialise())
    assert columns_of([examiner.benchmark]) == list(metrics)
    assert metrics["chat/task0"] == 0.75 and metrics["chat/task1"] == 1
    assert metrics["chat/mean"] == 0.75 and metrics["chat/mean_stderr"] > 0
    assert examiner.training == [False, False]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "OutOfMemoryError: CUDA out of memory."),
        (UserError("chat: out of memory."), "chat: out of memory."),
        (FileNotFoundError(2, "No such file or directory", "/gone"), "FileNotFoundError: [Errno 2] No such file"),
        (RuntimeError("a bug\nof many lines"), "RuntimeError: a bug\n"),
    ],
)
def test_what_cannot_be_measured_is_left_out(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The mean of the others would be another metric under the same name."""
    net = GPT(tiny_model()).materialise()
    assert measure(Examiner(error, [1, 0]).benchmark, net) == {"chat/task1": 0.5}
    assert net.training
    assert f"chat: task0 is left out of this measurement: {said}" in capsys.readouterr().out


def test_a_weak_sandbox_is_said_with_the_score(capsys: pytest.CaptureFixture[str]) -> None:
    remarked = make_result("code", ["a"], [1.0], details={"remark": "sandbox=weak: no network isolation"})
    benchmark = Benchmark("chat", 1, ["code"], lambda name, net, meanwhile: remarked)
    measure(benchmark, GPT(tiny_model()).materialise())
    assert "chat: code: sandbox=weak: no network isolation" in capsys.readouterr().out


@pytest.mark.parametrize("end", [StopRequested(15, 3), KeyboardInterrupt()])
def test_a_stop_is_a_stop(end: BaseException) -> None:
    with pytest.raises(type(end)):
        measure(Examiner(end).benchmark, GPT(tiny_model()).materialise())


def fails_on_one(rank: int) -> dict[str, float]:
    """Two tasks; of the first one a process fails."""

    def measure_task(name: str, net: GPT, meanwhile: Callable[[], None]) -> TaskResult:
        if name == "broken" and collectives.rank() == rank:
            coordination.raise_on_all_ranks(lambda: Path("/gone/at/all").read_text())
        coordination.raise_on_all_ranks(lambda: None)
        return make_result(name, ["a", "b"], [0.0, 1.0])

    return measure(Benchmark("chat", 1, ["broken", "whole"], measure_task), GPT(tiny_model()).materialise())


def test_a_failure_of_one_process_is_known_to_all() -> None:
    assert run(2, fails_on_one, 1) == [{"chat/whole": 0.5}] * 2


@pytest.mark.slow
def test_a_judge_that_fails_ends_no_training(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*given: object) -> bool:
        raise FileNotFoundError(2, "No such file or directory", "/tmp/gone")

    monkeypatch.setattr("nanochat_pl.tasks.synthetic.arithmetic.Arithmetic.evaluate", fails)
    start_run(place, "unjudged", "sft")
    assert main(["train", "run=unjudged", *sft_overrides(place), *CHAT]) == 0
    left_out = "chat: arithmetic is left out of this measurement: FileNotFoundError: [Errno 2] No such file"
    assert capsys.readouterr().out.count(left_out) == 3
    rows = lines(place / "runs/unjudged/sft/metrics.csv")
    assert rows[-1]["chat/identity"] and not any(row["chat/arithmetic"] + row["chat/mean"] for row in rows)


def test_there_is_a_resume_file_before_a_benchmark_is_measured(tmp_path: Path) -> None:
    examiner, found = Examiner([1.0]), list[str]()
    examiner.when_asked = lambda: found.append(max(path.name for path in (tmp_path / "checkpoints").iterdir()))
    fit_tiny(tmp_path, num_steps=5, checkpoint_every_steps=100, benchmarks=[examiner.benchmark])
    assert found == ["step=000002.ckpt", "step=000004.ckpt"]


def test_it_is_measured_every_so_many_steps_and_not_at_the_last(tmp_path: Path) -> None:
    """The last step is measured after the fit, beside the final validation."""
    examiner = Examiner([1.0])
    fit_tiny(tmp_path, num_steps=6, benchmarks=[examiner.benchmark])
    assert examiner.asked == ["task0"] * 2
    never = Examiner([1.0], every_steps=0)
    fit_tiny(tmp_path / "never", num_steps=4, benchmarks=[never.benchmark])
    assert not never.asked


def test_a_stop_within_is_made_up_for_and_nothing_is_measured_twice(tmp_path: Path) -> None:
    first = Examiner([1.0], [1.0])
    first.when_asked = lambda: signal.raise_signal(signal.SIGTERM)
    with pytest.raises(StopRequested):
        fit_tiny(tmp_path, num_steps=5, benchmarks=[first.benchmark])
    second = Examiner([1.0], [1.0])
    fit_tiny(tmp_path, num_steps=5, benchmarks=[second.benchmark])
    assert first.asked == ["task0"] and not first.training, "a process that is alone need not come to the task's end"
    assert second.asked == ["task0", "task1"] * 2, "after step 2, to make up for it, and after step 4"


def test_a_chat_model_is_measured_and_trains_as_if_it_were_not(place: Path) -> None:
    for name in ("unmeasured", "measured"):
        start_run(place, name, "sft")
    still = [*sft_overrides(place), "max_steps=5", "model.compute_dtype=float32"]
    assert main(["train", "run=unmeasured", *still]) == 0
    assert main(["train", "run=measured", *sft_overrides(place), *CHAT]) == 0
    runs = place / "runs"
    assert same_weights(weights_of(runs / "unmeasured", "sft"), weights_of(runs / "measured", "sft"))
    rows = lines(runs / "measured/sft/metrics.csv")
    names = ("chat/arithmetic", "chat/identity", "chat/mean", "chat/mean_stderr")
    assert [bool(row[name]) for name in names for row in rows] == [False, True, False, True, True] * 4
    assert all(0 <= float(row[name]) <= 1 for name in names for row in rows if row[name])
    finished = json.loads((runs / "measured/sft/finished.json").read_text(encoding="utf-8"))
    assert {name: finished["metrics"][name] for name in names} == {name: float(rows[-1][name]) for name in names}
    assert "chat/mean" not in lines(runs / "unmeasured/sft/metrics.csv")[0]


def finished_metrics(stage: Path) -> dict[str, float]:
    return json.loads((stage / "finished.json").read_text(encoding="utf-8"))["metrics"]


@pytest.mark.slow
def test_a_stop_in_the_last_benchmarks_leaves_the_bundle_and_is_gone_on_from(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was trained and measured is not trained and measured again."""
    for name in ("not-stopped-late", "stopped-late"):
        start_run(place, name, "sft")
    command = [*sft_overrides(place), *CHAT, "evaluation.chat_every_steps=0"]
    assert main(["train", "run=not-stopped-late", *command]) == 0
    expected, stage = (place / "runs" / name / "sft" for name in ("not-stopped-late", "stopped-late"))
    judged, evaluate = list[str](), Arithmetic.evaluate

    def stops(self: Arithmetic, *given: Any) -> bool:
        judged.append(self.name)
        signal.raise_signal(signal.SIGTERM)
        return evaluate(self, *given)

    monkeypatch.setattr(Arithmetic, "evaluate", stops)
    assert main(["train", "run=stopped-late", *command]) == 128 + signal.SIGTERM
    assert "Stopped after step 5. The same command goes on from there." in capsys.readouterr().out
    assert set(judged) == {"arithmetic"} and not (stage / "finished.json").exists()
    metrics = load_bundle(stage / "bundle").stage.metrics
    assert "val/bpb" in metrics and "chat/mean" not in metrics

    def trains(*given: Any) -> None:
        raise AssertionError("it was trained")

    monkeypatch.setattr(LMModule, "training_step", trains)
    judged.clear()
    assert main(["train", "run=stopped-late", *command]) == 0
    assert not judged, "its result was kept"
    assert finished_metrics(stage) == load_bundle(stage / "bundle").stage.metrics == finished_metrics(expected)
    assert lines(stage / "metrics.csv")[-1]["chat/mean"] == lines(expected / "metrics.csv")[-1]["chat/mean"] != ""
    assert same_weights(weights_of(expected.parent, "sft"), weights_of(stage.parent, "sft"))


def test_results_of_other_weights_or_settings_are_none(tmp_path: Path) -> None:
    kept = BenchmarkCache(tmp_path / "benchmarks.json", "one")
    result = make_result("task0", ["a", "b"], [0.0, 1.0], details={"kind": "core"}, answers=[{"answer": "4"}])
    kept.put("core", result)
    assert BenchmarkCache(kept.path, "one").get("core", "task0") == replace(result, answers=[])
    assert BenchmarkCache(kept.path, "one").get("chat", "task0") is None
    assert BenchmarkCache(kept.path, "other").get("core", "task0") is None


@pytest.mark.parametrize("every_steps", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_stop_within_a_task(place: Path, monkeypatch: pytest.MonkeyPatch, every_steps: int) -> None:
    def stopped(*given: Any, progress: Callable[[int, int], None]) -> None:
        signal.raise_signal(signal.SIGTERM)
        progress(1, 2)
        raise AssertionError("it went on")

    monkeypatch.setattr(benchmarks, "evaluate_task", stopped)
    name = f"stopped-within-{every_steps}"
    start_run(place, name, "sft")
    command = [f"run={name}", *sft_overrides(place), *CHAT, f"evaluation.chat_every_steps={every_steps}"]
    assert main(["train", *command]) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_stop_of_several_processes_in_the_last_benchmarks(place: Path, tmp_path: Path) -> None:
    """The signal comes to one of them; they end after the task that they are at."""
    folder = start_run(place, "stopped-together", "sft") / "sft"
    own = ("total_batch_tokens=64", "device_batch_size=1", "evaluation.chat_every_steps=0")
    command = ["train", "run=stopped-together", *sft_overrides(place), *CHAT, *own]
    env = {"NANOCHAT_PL_TEST_JUDGE": "1", "NANOCHAT_PL_TEST_CODES": str(tmp_path)}
    done = launch(2, command, env, cwd=REPOSITORY, module=MODULE)
    codes = {path.name: int(path.read_text()) for path in tmp_path.iterdir()}
    assert codes == {"0": 128 + signal.SIGUSR1, "1": 128 + signal.SIGUSR1}, done.stderr
    assert load_bundle(folder / "bundle").stage.step == 5 and not (folder / "finished.json").exists()
    assert list(json.loads((folder / "benchmarks.json").read_text())["results"]) == ["chat/arithmetic"]
    assert launch(2, command).returncode == 0
    assert "chat/mean" in finished_metrics(folder)


@pytest.mark.slow
def test_several_processes_measure_the_same(place: Path) -> None:
    for name in ("alone", "together"):
        start_run(place, name, "sft")
    own = ("total_batch_tokens=64", "device_batch_size=1", *CHAT)
    assert main(["train", "run=alone", *sft_overrides(place), *own]) == 0
    done = launch(2, ["train", "run=together", *sft_overrides(place), *own])
    assert done.returncode == 0, done.stdout + done.stderr
    alone, in_two = (lines(place / "runs" / name / "sft/metrics.csv") for name in ("alone", "together"))
    names = [name for name in alone[0] if name.startswith("chat/")]
    assert len(names) == 4
    assert [[row[name] for name in names] for row in alone] == [[row[name] for name in names] for row in in_two]


@pytest.mark.parametrize(
    ("stage", "overrides", "said"),
    [
        ("sft", ["evaluation.chat.conversations.mine.path=x"], "mine"),
        ("sft", ["evaluation.chat.arithmetic.max_operand=5"], "evaluation.chat.arithmetic.max_operand"),
        ("base", ["evaluation.core.path=nowhere/at/all"], "nowhere/at/all"),
        ("base", ["evaluation.core.tasks=[]"], "evaluation.core"),
    ],
)
def test_what_cannot_be_measured_is_said_before_the_training(
    place: Path,
    train: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    stage: str,
    overrides: list[str],
    said: str,
) -> None:
    name = f"early-{stage}-{len(said)}"
    folder = start_run(place, name, stage)
    assert train(f"run={name}", *overrides, stage=stage) == 2
    assert said in capsys.readouterr().err
    assert not (folder / stage / "metrics.csv").exists()


def test_core_is_left_out_where_its_data_is_not(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_run(place, "no-core", "base")
    assert main(["train", "run=no-core", *tiny_overrides(place), "max_steps=1"]) == 0
    assert "CORE is left out: its data is not here" in capsys.readouterr().out
    assert (
        main(
            [
                "train",
                "run=no-core",
                "resume=never",
                *tiny_overrides(place),
                "max_steps=1",
                "evaluation.core_every_steps=null",
            ]
        )
        == 0
    )
    assert "CORE" not in capsys.readouterr().out


def test_core_is_measured_while_a_base_model_trains(
    place: Path, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start_run(place, "core", "base")
    core = [
        "max_steps=3",
        "evaluation.core_every_steps=2",
        f"evaluation.core.path={shared / 'data' / 'eval_bundle'}",
        "evaluation.core.max_per_task=3",
        "evaluation.core.tasks=[copa,bigbench_cs_algorithms]",
    ]
    assert main(["train", "run=core", *tiny_overrides(place), *core]) == 0
    said = capsys.readouterr().out
    assert "CORE (2 tasks) is measured every 2 steps and at the end" in said
    assert "evaluation.core_every_steps=null leaves it out" in said
    rows = lines(place / "runs/core/base/metrics.csv")
    names = ("core/copa", "core/bigbench_cs_algorithms", "core/mean")
    assert [bool(row[name]) for name in names for row in rows] == [False, False, True, True] * 3  # step 0 first
