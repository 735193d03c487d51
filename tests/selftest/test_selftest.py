"""The self-test passes where all is well, and each of its checks finds the mistake that it is there for."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat_pl.cli.main import main
from nanochat_pl.model.gpt import GPT
from nanochat_pl.optim.muon_adamw import MuonAdamW
from nanochat_pl.selftest import batch_invariance, checks, collective_checks
from nanochat_pl.selftest.checks import Check, Finding, Setup, within
from nanochat_pl.selftest.run import end_without_answer, run_checks, verdict
from nanochat_pl.training.checkpoint.io import AtomicCheckpointIO
from nanochat_pl.training.tiny_steps import NUM_STEPS
from tests.helpers.launch import launch
from tests.selftest import make_expected
from tests.selftest.mistakes import MISTAKES

ALL = {check.name: check for check in (*checks.CHECKS, *collective_checks.CHECKS)}


def setup_of(folder: Path) -> Setup:
    return Setup(torch.device("cpu"), "bfloat16", "auto", folder, folder, "version 1")


def failed(name: str, folder: Path) -> set[str]:
    """The lines of a check that fail, on this process alone."""
    findings = run_checks([ALL[name]], setup_of(folder), 120.0)
    return {finding.check for finding in findings if finding.result == "FAILED"}


def test_where_all_is_well_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "CHECKS", [check for check in checks.CHECKS if check.name != "torch.compile"])
    to = tmp_path / "table.json"
    assert main(["selftest", f"to={to}", f"paths.runs={tmp_path / 'runs'}", "accelerator=cpu"]) == 0
    shown = capsys.readouterr().out
    table = json.loads(to.read_text(encoding="utf-8"))
    passed = [line for line in table["checks"] if line["result"] == "ok"]
    assert table["passed"] and f"\nall {len(passed)} checks passed (5 left out: collectives: " in shown
    assert len(passed) >= 12 and all(line["check"] in shown for line in table["checks"])
    assert not list((tmp_path / "runs").iterdir()), "it leaves nothing where runs are"


def test_a_failure_gives_exit_code_1_and_is_named_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "CHECKS", [ALL["memory"]])
    monkeypatch.setattr(collective_checks, "CHECKS", [])
    monkeypatch.setattr(checks, "memory_bytes", lambda device: 2**20)
    assert main(["selftest", f"paths.runs={tmp_path}"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 3 checks FAILED: memory"


def test_a_wrong_key_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "acelerator=cpu", "timeout_seconds=0"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "did you mean accelerator?" in said.err and "timeout_seconds=0: is not above 0" in said.err


def wrong_but_for_the_first(make: Callable[..., GPT]) -> Callable[..., GPT]:
    """Models like the first one, which is the CPU's, but for a head that is a tenth larger."""
    made: list[GPT] = []

    def changed(*arguments: Any) -> GPT:
        made.append(make(*arguments))
        if len(made) > 1:
            made[-1].lm_head.weight.data *= 1.1
        return made[-1]

    return changed


def compiled_wrong(right: Any) -> Any:
    """``torch.compile``, of functions whose results are then ten percent too large."""

    def compile_(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def larger(*arguments: Any) -> Any:
            result = function(*arguments)
            return result * 1.1 if isinstance(result, Tensor) else tuple(each * 1.1 for each in result)

        return larger

    return compile_


def with_a_larger_rate(step: Callable[[MuonAdamW], None]) -> Callable[[MuonAdamW], None]:
    def changed(optimizer: MuonAdamW) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 1.05
        step(optimizer)

    return changed


def without_a_moment(load: Callable[..., Any]) -> Callable[..., Any]:
    def changed(io: AtomicCheckpointIO, path: Path) -> Any:
        saved = load(io, path)
        for state in saved["optimizer"]["state"].values():
            state |= {name: torch.zeros_like(state[name]) for name in ("exp_avg", "momentum") if name in state}
        return saved

    return changed


GRADIENTS = {"loss and gradients in float32", "loss and gradients in bfloat16"}
LOSSES, NORMS = f"training: losses of {NUM_STEPS} steps", "training: gradient norms"


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "wrong", "expected"),
    [
        ("device", torch, "arange", lambda right: lambda *a, **k: right(*a, **k) + 1, {"device"}),
        ("memory", checks, "free_bytes", lambda right: lambda path: 2**20, {"disk of runs", "disk of caches"}),
        ("loss and gradients", checks, "tiny_net", wrong_but_for_the_first, GRADIENTS),
        ("torch.compile", torch, "compile", compiled_wrong, {"torch.compile"}),
        ("training", MuonAdamW, "reduce_gradients", lambda right: lambda self: right(self) * 1.01, {NORMS}),
        ("training", MuonAdamW, "step", with_a_larger_rate, {LOSSES, NORMS}),
        ("resume file", AtomicCheckpointIO, "load_checkpoint", lambda right: lambda *a: {}, {"resume file"}),
        ("resume file", AtomicCheckpointIO, "load_checkpoint", without_a_moment, {"resume file"}),
    ],
)
def test_what_is_computed_wrong_is_found(
    name: str,
    owner: Any,
    attribute: str,
    wrong: Callable[[Any], Any],
    expected: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(owner, attribute, wrong(getattr(owner, attribute)))
        assert failed(name, tmp_path) == expected


def test_a_compiler_that_is_not_there_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    (finding,) = run_checks([ALL["torch.compile"]], setup_of(tmp_path), 120.0)
    assert finding[:3] == ("torch.compile", "left out", "no compiler; trainings are not compiled")


@pytest.mark.slow
def test_batch_invariance_is_that_of_the_products_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With products in which the rows beside a row matter, it says so, and is no failure."""
    in_float32, in_bfloat16 = run_checks([ALL["batch invariance"]], setup_of(tmp_path), 120.0)
    assert in_float32[:2] == ("batch invariance of float32", "ok") and in_bfloat16[:2] == (
        "batch invariance of bfloat16",
        "ok",
    )
    assert in_float32.metric.startswith("a row has the same bits ")
    right = torch.nn.functional.linear

    def worse_in_company(x: Tensor, weight: Tensor) -> Tensor:
        return right(x, weight) * (1 + (len(x) > 8) * 0.01 + (len(x) > 32) * 0.01)

    monkeypatch.setattr(torch.nn.functional, "linear", worse_in_company)
    monkeypatch.setattr(batch_invariance, "in_one_block", lambda q, *others: q * len(others))
    (_, found) = run_checks([ALL["batch invariance"]], setup_of(tmp_path), 120.0)
    assert found.result == "ok"
    assert found.metric == (
        "a row has the same bits within {1 … 8}, {12 … 32}, {64 … 256} rows; attention over a cache has other bits at"
        " 10 of 10 lengths with 1 query, other bits at 10 of 10 lengths with 4 queries"
    )


def test_an_error_in_a_check_is_its_failure_and_the_others_go_on(tmp_path: Path) -> None:
    def broken(setup: Setup) -> Sequence[Finding]:
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    findings = run_checks(
        [Check("a", broken), Check("b", lambda setup: [Finding("b", "ok", "")])], setup_of(tmp_path), 60.0
    )
    assert findings[0] == Finding("a", "FAILED", "RuntimeError: CUDA error: an illegal memory access")
    assert verdict(findings) == "1 of 2 checks FAILED: a"


def test_nan_is_no_agreement() -> None:
    nan = collective_checks._furthest([1.0, float("nan")], [1.0, 1.0])
    assert within("x", nan, 1.0).result == "FAILED"


def test_what_one_of_two_processes_does_wrong_is_found_and_the_process_named(tmp_path: Path) -> None:
    done = launch(2, [str(tmp_path)], module="tests.selftest.mistakes")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))

    def wrong_in(name: str) -> dict[str, str]:
        return {check: metric for check, result, metric, _ in found[name] if result == "FAILED"}

    assert wrong_in("none") == {"same software": "process 1: version 1"}
    for name, (*_, line, ranks) in MISTAKES.items():
        wrong = wrong_in(name)
        assert {rank for rank in "01" if f"process {rank}: " in wrong[line]} == set(ranks), (name, wrong)


def test_a_check_without_an_answer_ends_the_process_with_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    with end_without_answer("collectives", 0.01):
        assert ended.wait(60)
    assert codes == [1]
    said = capsys.readouterr().err
    assert "process 0 of 1: collectives: no answer in 0 s" in said and "timeout_seconds=600" in said


@pytest.mark.slow
def test_the_stored_figures_are_those_of_the_plain_model_and_optimizer() -> None:
    stored = json.loads(make_expected.FILE.read_text(encoding="utf-8"))
    for name, metrics in make_expected.losses_and_norms().items():
        assert stored[name] == pytest.approx(metrics, rel=1e-7)


@pytest.mark.slow
def test_the_whole_of_it_on_this_machine(tmp_path: Path) -> None:
    arguments = ["selftest", "timeout_seconds=280", f"paths.runs={tmp_path}", f"to={tmp_path / 'table.json'}"]
    done = launch(3, arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checks passed" in done.stdout.splitlines()[-1]
    assert done.stdout.count("checks passed") == 1, "the first process alone speaks"
