"""Sums of gradients that begin in the backward, against sums that begin after it: bit for bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat_pl.optim.early_reduction import EarlyReduction
from tests.helpers import early_jobs
from tests.helpers.processes import run

Results = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run(2, early_jobs.cases, str(tmp_path_factory.mktemp("files")))


@pytest.mark.parametrize("case", early_jobs.CASES)
def test_no_bit_depends_on_when_a_sum_begins(results: Results, case: str) -> None:
    for each in results:
        early, late = each[case]["early"], each[case]["late"]
        for what in ("norms", "losses", "skipped", "rows"):
            assert early[what] == late[what], what
        assert early["skipped"] == [False, False, case == "skipped", False]
        assert early["rows"] == (1 if "out of memory" in case else 2)
        for name, weight in late["weights"].items():
            assert torch.equal(early["weights"][name], weight), name
    early, late = results[0][case]["early"], results[0][case]["late"]
    assert late["moments"] and all(torch.equal(early["moments"][name], m) for name, m in late["moments"].items())


@pytest.mark.parametrize("case", early_jobs.CASES)
def test_processes_begin_the_same_sums_in_one_order(results: Results, case: str) -> None:
    mine, theirs = ([[size for _, size in step] for step in each[case]["early"]["sums"]] for each in results)
    assert mine == theirs


def test_sums_begin_before_the_backward_ends_from_the_second_step_on(results: Results) -> None:
    for each in results:
        early, late = each["plain"]["early"], each["plain"]["late"]
        steps = [[is_in_backward for is_in_backward, _ in step] for step in early["sums"]]
        assert steps == [[False] * early["shards"]] + [[True] * early["shards"]] * (early_jobs.NUM_STEPS - 1)
        assert not any(is_in_backward for step in late["sums"] for is_in_backward, _ in step)


def test_where_memory_ran_out_the_sums_are_made_twice(results: Results) -> None:
    """Those of the step that is dropped: the process where memory ran out takes part in what the other began."""
    for each in results:
        for case in ("first forward", "last forward", "last backward"):
            early = each[f"out of memory in the {case}"]["early"]
            assert [len(step) for step in early["sums"]] == [early["shards"] * n for n in (1, 1, 2, 1)]


def test_a_gradient_that_one_process_lacks_ends_all_and_nothing_is_under_way() -> None:
    (first, *mine), (second, *theirs) = run(2, early_jobs.missing_gradient)
    assert mine == theirs == [True, 2]
    assert "another process" in first and "no gradient for h.1.c_q.weight:" in second


class FakeShard(SimpleNamespace):
    """One parameter; notes when its sum begins."""

    def start_reduce(self) -> Any:
        (parameter,) = self.parameters
        self.begun.append((self.names[0], parameter.grad))
        parameter.grad = None
        return SimpleNamespace(wait=lambda: None)


def test_a_shard_waits_for_those_before_it() -> None:
    begun: list[tuple[str, Any]] = []
    a, b, c = (torch.ones(1, requires_grad=True) for _ in range(3))
    shards: Any = [FakeShard(names=[n], parameters=[p], begun=begun) for n, p in {"c": c, "a": a, "b": b}.items()]
    early = EarlyReduction(shards)
    with early.reducing():
        for each in (a, b, c):
            each.sum().backward()
    assert begun == [] and early.pending == []  # the order is recorded
    early.agree_on_order()
    with early.reducing():
        b.sum().backward()
        assert begun == []
        a.sum().backward()
        assert [name for name, _ in begun] == ["a", "b"]
        c.grad = None  # it has none in this backward
    assert [name for name, _ in begun] == ["a", "b", "c"] and begun[2][1] == 0 and early.missing == ["c"]
    c.sum().backward()
    assert len(begun) == 3 and c.grad == 1  # outside nothing is begun


def test_a_second_backward_inside_is_an_error() -> None:
    a = torch.ones(1, requires_grad=True)
    early = EarlyReduction([FakeShard(names=["a"], parameters=[a], begun=[])])  # type: ignore[list-item]
    with early.reducing(), pytest.raises(AssertionError, match="two gradients"):
        a.sum().backward()
        a.sum().backward()


def test_compiled_layers_are_not_compiled_again_for_it() -> None:
    """The first step has no hooks on its parameters, the others have."""
    compiles = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal compiles
        compiles += 1
        return graph.forward

    layer = torch.nn.Linear(3, 3)
    weight, bias = layer.parameters()
    early = EarlyReduction(
        [FakeShard(names=[n], parameters=[p], begun=[]) for n, p in (("w", weight), ("b", bias))]  # type: ignore[list-item]
    )
    call = torch.compile(lambda inputs: layer(inputs).sum(), backend=backend, dynamic=False)
    for _ in range(2):
        call(torch.ones(2, 3)).backward()
        early.agree_on_order()
        with early.reducing():
            call(torch.ones(2, 3)).backward()
    assert compiles == 1 and len(early.pending) == 2
