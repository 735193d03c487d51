"""The self-test passes where all is well, and each of its checks finds the mistake that it is there for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat_pl.cli.main import main
from nanochat_pl.model import attention
from nanochat_pl.optim import MuonAdamW
from nanochat_pl.selftest import collective_checks as selftest_processes
from nanochat_pl.selftest import device_checks
from nanochat_pl.selftest.checks import Bench, Check, Finding
from nanochat_pl.selftest.run import run_checks, verdict
from nanochat_pl.training import tiny_steps
from nanochat_pl.training.checkpoint.io import AtomicCheckpointIO
from tests.helpers.launch import launch
from tests.selftest import make_expected
from tests.selftest.mistakes import MISTAKES

QUICK = [check for check in device_checks.CHECKS if check.name != "torch.compile"]


@pytest.fixture(scope="module")
def together() -> Any:
    """The checks of the optimizer; what one process makes of it is computed once."""
    with selftest_processes.make_checks() as checks:
        yield {check.name: check for check in checks}


def failed(check: Check, folder: Path) -> set[str]:
    """The lines of a check that fail, on this process alone."""
    bench = Bench(torch.device("cpu"), "bfloat16", "auto", folder, folder)
    return {finding.check for finding in run_checks([check], bench, 120.0) if finding.result == "FAILED"}


def check_named(name: str) -> Check:
    return next(check for check in device_checks.CHECKS if check.name == name)


def test_where_all_is_well_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_checks, "CHECKS", QUICK)
    to = tmp_path / "table.json"
    command = ["selftest", f"to={to}", f"paths.runs={tmp_path / 'runs'}", "accelerator=cpu"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    table = json.loads(to.read_text(encoding="utf-8"))
    passed = [line for line in table["checks"] if line["result"] == "ok"]
    assert table["passed"] and f"\nall {len(passed)} checks passed (5 left out: collectives: " in shown
    assert len(passed) >= 20 and all(line["check"] in shown for line in table["checks"])
    assert not list((tmp_path / "runs").iterdir()), "it leaves nothing where runs are"


def test_a_failure_gives_exit_code_1_and_is_named_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_checks, "CHECKS", [check_named("memory")])
    monkeypatch.setattr(selftest_processes, "make_checks", lambda: selftest_processes.contextlib.nullcontext(()))
    monkeypatch.setattr(device_checks, "memory_bytes", lambda device: 2**20)
    assert main(["selftest", f"paths.runs={tmp_path}"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 3 checks FAILED: memory"


def test_a_wrong_key_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "acelerator=cpu", "timeout_seconds=0"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "did you mean accelerator?" in said.err and "timeout_seconds=0.0: is not above 0" in said.err


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is five percent too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 1.05


def wrong_gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, *rest, **named: function(Scaled.apply(q), *rest, **named)


def second_call(function: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """The function, but for its later calls, whose results are changed."""
    calls = []

    def changed(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        result = function(*arguments, **named)
        return change(result) if len(calls) > 1 else result

    return changed


def larger(net: Any) -> Any:
    with torch.no_grad():
        net.lm_head.weight *= 1.1
    return net


def larger_result(result: Any) -> Any:
    return result * 1.1 if isinstance(result, Tensor) else tuple(each * 1.1 for each in result)


def refused(*arguments: Any, **named: Any) -> Any:
    raise RuntimeError("no execution plan supports the graph")


ATTENTION = "attention in float32: "
MISTAKES_ALONE: list[tuple[str, Any, str, Callable[[Any], Any], set[str]]] = [
    ("device", torch, "arange", lambda right: lambda *a, **k: right(*a, **k) + 1, {"device"}),
    ("memory", device_checks, "free_bytes", lambda right: lambda path: 2**20, {"disk of runs", "disk of caches"}),
    (
        "attention",
        attention,
        "products",
        wrong_gradient,
        {
            f"attention in {dtype}: {way}"
            for dtype in ("float32", "bfloat16")
            for way in ("as trained", "plain products")
        },
    ),
    (
        "attention",
        attention,
        "band_mask",
        lambda right: lambda queries, keys, offset, window, device: right(queries, keys, offset, window - 1, device),
        {ATTENTION + "as trained", ATTENTION + "plain products", ATTENTION + "sdpa, math", ATTENTION + "sdpa, flash"},
    ),
    (
        "attention",
        attention,
        "sdpa",
        lambda right: lambda q, k, v, scale, *rest: right(q, k, v, scale * 1.1, *rest),
        {ATTENTION + "sdpa, math", ATTENTION + "sdpa, flash"},
    ),
    (
        "attention",
        attention,
        "sdpa",
        lambda right: refused,
        {ATTENTION + "sdpa, math", ATTENTION + "sdpa, flash"},
    ),
    (
        "logits",
        device_checks,
        "tiny_net",
        lambda right: second_call(right, larger),
        {f"logits in {dtype}" for dtype in ("float32", "bfloat16", "float16")},
    ),
    (
        "loss",
        device_checks,
        "fused_linear_cross_entropy",
        lambda right: lambda x, *rest, **named: right(Scaled.apply(x), *rest, **named),
        {"loss in pieces, gradients"},
    ),
    (
        "torch.compile",
        torch,
        "compile",
        lambda right: lambda f, **k: lambda *a: larger_result(f(*a)),
        {"torch.compile"},
    ),
]


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "wrong", "expected"), MISTAKES_ALONE, ids=[mistake[2] for mistake in MISTAKES_ALONE]
)
def test_what_a_device_computes_wrong_is_found(
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
        found = failed(check_named(name), tmp_path)
    assert expected <= found, found
    assert name in ("device", "attention") or found == expected


def test_a_compiler_that_is_not_there_is_left_out_and_a_broken_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    assert failed(check_named("torch.compile"), tmp_path) == set()
    monkeypatch.setattr(device_checks, "why_not_compiled", lambda *kind: None)
    assert failed(check_named("torch.compile"), tmp_path) == {"torch.compile"}


def test_what_the_optimizer_does_wrong_is_found(
    together: dict[str, Check], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("optimizer", "training", "resume file"):
        assert failed(together[name], tmp_path) == set()
    step, reduce_gradients = MuonAdamW.step, MuonAdamW.reduce_gradients
    with monkeypatch.context() as patched:
        patched.setattr(MuonAdamW, "reduce_gradients", lambda self: reduce_gradients(self) * 1.01)
        assert failed(together["optimizer"], tmp_path) == {"optimizer: norms of summed gradients"}
        assert failed(together["training"], tmp_path) == {"training: gradient norms, stored"}

    def with_more_decay(optimizer: MuonAdamW) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 1.05
        step(optimizer)

    with monkeypatch.context() as patched:
        patched.setattr(MuonAdamW, "step", with_more_decay)
        assert failed(together["optimizer"], tmp_path) == {f"optimizer: {tiny_steps.NUM_STEPS} updates"}
        assert "training: first update" in failed(together["training"], tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(selftest_processes, "tiny_net", second_call(selftest_processes.tiny_net, larger))
        failed(together["training"], tmp_path)  # the first net is the right one
        assert {"training: losses", "training: losses, stored"} <= failed(together["training"], tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(AtomicCheckpointIO, "load_checkpoint", lambda self, path: {})
        assert failed(together["resume file"], tmp_path) == {"resume file"}


def test_an_error_in_a_check_is_its_failure_and_the_others_go_on(tmp_path: Path) -> None:
    def broken(bench: Bench) -> Sequence[Finding]:
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    bench = Bench(torch.device("cpu"), "float32", "auto", tmp_path, tmp_path)
    findings = run_checks([Check("a", broken), Check("b", lambda bench: [Finding("b", "ok", "")])], bench, 60.0)
    assert findings[0] == Finding("a", "FAILED", "RuntimeError: CUDA error: an illegal memory access")
    assert verdict(findings) == "1 of 2 checks FAILED: a"


def test_nan_is_no_agreement() -> None:
    assert selftest_processes.within("x", float("nan"), 1.0).result == "FAILED"
    assert (
        selftest_processes.within("x", selftest_processes._furthest([1.0, float("nan")], [1.0, 1.0]), 1).result
        == "FAILED"
    )


def test_what_one_of_two_processes_does_wrong_is_found_and_the_process_named(tmp_path: Path) -> None:
    done = launch(2, [str(tmp_path)], module="tests.selftest.mistakes")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    for name, (*_, expected) in MISTAKES.items():
        wrong = {check: figure for check, result, figure, _ in found[name] if result == "FAILED"}
        assert expected.keys() <= wrong.keys(), (name, wrong)
        for check, ranks in expected.items():
            named = {rank for rank in "01" if f"process {rank}: " in wrong[check]}
            assert named == set(ranks), (name, check, wrong[check])
        if not expected:
            assert not wrong, wrong


def test_a_check_without_an_answer_ends_the_process_with_its_name() -> None:
    program = (
        "import time; from nanochat_pl.selftest.run import no_answer_ends\n"
        "with no_answer_ends('collectives', 0.2): time.sleep(600)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "process 0 of 1: collectives: no answer in 0 s" in done.stderr


@pytest.mark.parametrize("num_steps", [1, pytest.param(tiny_steps.NUM_STEPS, marks=pytest.mark.slow)])
def test_the_stored_figures_are_those_of_the_plain_model_and_optimizer(num_steps: int) -> None:
    stored = json.loads(make_expected.FILE.read_text(encoding="utf-8"))
    for name, figures in make_expected.losses_and_norms(num_steps).items():
        assert stored[name][:num_steps] == pytest.approx(figures, rel=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_the_whole_of_it_on_this_machine(processes: int, tmp_path: Path) -> None:
    done = launch(processes, ["selftest", f"paths.runs={tmp_path}", f"to={tmp_path / 'table.json'}"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checks passed" in done.stdout.splitlines()[-1]
    assert done.stdout.count("checks passed") == 1, "the first process alone speaks"
