"""Work that processes do one after the other or one for all, and errors that all of them share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nanochat_pl.common.errors import SharedError, UserError
from nanochat_pl.distributed import collectives, coordination
from tests.helpers.processes import run


def refuse(problem: str) -> None:
    raise UserError(problem, "do this")


def errors_are_shared(failing: list[int]) -> dict[str, Any]:
    rank = collectives.rank()
    try:
        coordination.raise_on_all_ranks(lambda: refuse(f"no {rank}") if rank in failing else "done")
    except SharedError as error:
        return {"problems": list(error.problems), "fix": error.fix}
    return {"total": collectives.all_reduce_sum(1)}


@pytest.mark.parametrize(
    ("failing", "problem"), [([0], "no 0"), ([1, 2], "process 1: no 1"), ([2, 0], "no 0"), ([2], "process 2: no 2")]
)
def test_an_error_of_one_process_is_raised_on_all(failing: list[int], problem: str) -> None:
    assert run(3, errors_are_shared, failing) == [{"problems": [problem], "fix": "do this"}] * 3


def test_without_errors_all_go_on() -> None:
    assert run(3, errors_are_shared, []) == [{"total": 3}] * 3


def one_for_all() -> list[Any]:
    calls: list[int] = []

    def work() -> dict[str, Any]:
        calls.append(collectives.rank())
        return {"words": ["ä", None], "number": 0.1}

    result = coordination.run_on_rank_zero(work)
    try:
        coordination.run_on_rank_zero(lambda: refuse("full"))
    except SharedError as error:
        return [calls, result, str(error)]
    return []


def test_the_main_process_works_for_all() -> None:
    result = {"words": ["ä", None], "number": 0.1}
    expected = [[[rank] if rank == 0 else [], result, "full\ndo this"] for rank in range(3)]
    assert run(3, one_for_all) == expected


def in_turns(folder: str, local_ranks: list[int]) -> str:
    """Who was there already when this process came."""
    rank = collectives.rank()
    os.environ["LOCAL_RANK"] = str(local_ranks[rank])

    def work() -> str:
        found = "".join(sorted(path.name for path in Path(folder).iterdir()))
        (Path(folder) / str(rank)).touch()
        return found

    return coordination.rank_zero_first(work)


@pytest.mark.parametrize(
    ("local_ranks", "first"), [([0, 1, 2, 3], [""] + ["0"] * 3), ([0, 1, 0, 1], ["", "02", "0", "02"])]
)
def test_the_main_process_then_one_of_each_node_then_all(
    tmp_path: Path, local_ranks: list[int], first: list[str]
) -> None:
    """The first of a node finds what those before it have made; the rest come all at once, and find it all."""
    found = run(4, in_turns, str(tmp_path), local_ranks)
    for local_rank, seen, expected in zip(local_ranks, found, first, strict=True):
        assert seen == expected if local_rank == 0 else set(seen) >= set(expected), found


def hold_against_main(texts: list[str]) -> str:
    try:
        coordination.assert_equal_across_ranks(
            texts[collectives.rank()], lambda mains: f"differs from {mains}.", "do this"
        )
    except SharedError as error:
        return error.problems[0]
    return ""


def test_what_must_be_the_same_is_compared_with_the_main_process() -> None:
    assert run(3, hold_against_main, ["a", "a", "a"]) == [""] * 3
    assert run(3, hold_against_main, ["a", "a", "b"]) == ["process 2: differs from a."] * 3


def test_one_process_is_a_plain_call() -> None:
    assert (
        coordination.raise_on_all_ranks(lambda: 1)
        == coordination.run_on_rank_zero(lambda: 1)
        == coordination.rank_zero_first(lambda: 1)
        == 1
    )
    coordination.assert_equal_across_ranks("a", lambda mains: "differs", "")
    with pytest.raises(UserError) as raised:
        coordination.raise_on_all_ranks(lambda: refuse("no"))
    assert not isinstance(raised.value, SharedError)


def any_failure_is_shared(failing: int) -> str:
    def fail() -> None:
        if collectives.rank() == failing:
            raise ZeroDivisionError("of nothing")

    try:
        with coordination.failures_on_all_ranks():
            coordination.raise_on_all_ranks(fail)
    except UserError as error:
        return error.problems[0]
    return ""


def test_any_failure_may_be_shared() -> None:
    assert run(2, any_failure_is_shared, 1) == ["process 1: ZeroDivisionError: of nothing"] * 2
    assert run(1, any_failure_is_shared, 0) == ["ZeroDivisionError: of nothing"]
    with pytest.raises(ZeroDivisionError):
        coordination.raise_on_all_ranks(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError), coordination.failures_on_all_ranks(but=(ArithmeticError,)):
        coordination.raise_on_all_ranks(lambda: 1 // 0)
