"""THE training step of two processes: what one makes of it, and faults of one of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.processes import run
from tests.helpers.step_processes import all_cases, steps
from tests.helpers.steps import BATCH

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results() -> Results:
    """What each of two processes says of each case."""
    return run(2, all_cases)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("five rows", {"rows": 5, "device_batch_size": 1}),
        ("documents kept apart", {"rows": 5, "document_start_id": int(BATCH.inputs[0, 3])}),
        ("one row", {"rows": 1}),
        ("one process of two has one micro-batch more", {"rows": 3, "device_batch_size": 1}),
        ("clipped", {"rows": 5, "max_grad_norm": 0.3}),
    ],
)
def test_two_processes_make_the_step_of_one(results: Results, name: str, settings: dict[str, Any]) -> None:
    """Loss and norm, also where one has fewer rows or none: 1e-6, sums in another order. The same bits on both."""
    mine, theirs = (each[name] for each in results)
    assert mine["loss"] == theirs["loss"] and mine["norm"] == theirs["norm"]
    assert mine["weights"] == theirs["weights"] and mine["parts"] == theirs["parts"]
    alone = steps(**settings)
    assert mine["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert mine["norm"] == pytest.approx(alone["norm"], rel=1e-5)
    assert mine["weights"] == pytest.approx(alone["weights"], rel=1e-4, abs=1e-3)


def test_float16_trains_on_two_processes(results: Results) -> None:
    mine, theirs = (each["float16"] for each in results)
    assert mine == theirs and mine["loss"] == pytest.approx(steps(5)["loss"], rel=5e-3)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_where_memory_runs_out_on_one_process_both_do_the_step_again(results: Results, where: str) -> None:
    """With as many micro-batches on both, and the loss of a step without the fault: 1e-5, float32."""
    mine, theirs = (each[f"out of memory in {where}"] for each in results)
    assert mine == theirs and mine["device_batch_size"] == 1
    assert mine["parts"] == [0, 1, 0, 1, 2, 0, 1, 2]
    assert mine["loss"] == pytest.approx(results[0]["five rows"]["loss"], abs=1e-5)


def test_with_one_row_both_end(results: Results) -> None:
    mine, theirs = (each["out of memory with one row"] for each in results)
    assert mine == theirs and mine["kept"]
    assert "out of memory on process 1, with one row of 16 tokens" in mine["said"][0]


def test_weights_of_one_process_that_are_nan_stop_both_before_the_update(results: Results) -> None:
    mine, theirs = (each["nan in weights"] for each in results)
    assert mine["said"] == theirs["said"]
    assert mine["finite"] and mine["kept"] and not theirs["finite"]
    said = " ".join(mine["said"])
    assert "step 2: the loss is nan. Its rows are 0 to 4." in said and "doctor step=2" in said
    assert "Weights of process 1" in said and "smear_lambda" in said and "process 0" not in said


def test_a_gradient_of_one_process_stops_both(results: Results) -> None:
    mine, theirs = (each["nan in a gradient"] for each in results)
    assert mine == theirs and mine["kept"] and "norm of the gradients" in mine["said"][0]


@pytest.mark.parametrize("name", ["nan in a gradient, skipped", "overflow"])
def test_both_skip_the_step_and_go_on(results: Results, name: str) -> None:
    """An overflow of one is one of both: their scales stay the same."""
    mine, theirs = (each[name] for each in results)
    assert mine == theirs and mine["kept"] and mine["skipped"] == [True, False]
    assert mine["guard"]["skipped_steps"] == 1
    assert mine["guard"]["loss_scale"]["factor"] == (2.0**15 if name == "overflow" else 1)
