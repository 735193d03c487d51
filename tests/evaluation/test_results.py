"""Results of tasks, their summaries, the differences of two models."""

from __future__ import annotations

import json
import math
import random

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.evaluation.results import (
    TaskResult,
    from_plain,
    make_result,
    paired_difference,
    paired_summary,
    summarize,
    to_plain,
)


def result(name: str = "task", right: int = 6, n: int = 10, baseline: float = 0.0, first: int = 0) -> TaskResult:
    """The first ``right`` of ``n`` problems are solved."""
    items = [f"problem {i}" for i in range(first, first + n)]
    return make_result(name, items, [float(i < right) for i in range(n)], baseline=baseline)


def test_figures_of_outcomes():
    made = make_result("x", ["a", "b", "c"], [1, 0.5, 0], baseline=0.25, details={"k": 1}, answers=[{"answer": "A"}])
    assert (made.n, made.accuracy, made.centered) == (3, 0.5, pytest.approx(1 / 3))
    assert made.stderr == pytest.approx(math.sqrt((0.25 * 4 + 0) / 5 / 5))  # of 1, 0.5, 0 and 0, 1
    assert (made.outcomes, made.details, made.answers) == ([1.0, 0.5, 0.0], {"k": 1}, [{"answer": "A"}])
    assert result(right=10).stderr > 0.05, "all right of ten problems is no certainty"


def test_a_summary_is_the_mean_of_centered_accuracies():
    tasks = [result("a", 70, 100, baseline=0.25), result("b", 30, 60), result("c", 0, 20, baseline=0.5)]
    found = summarize("CORE", tasks)
    assert (found.name, found.num_tasks, found.n) == ("CORE", 3, 180)
    assert found.value == pytest.approx((0.6 + 0.5 - 1) / 3)
    errors = [tasks[0].stderr / 0.75, tasks[1].stderr, tasks[2].stderr / 0.5]
    assert found.stderr == pytest.approx(math.hypot(*errors) / 3)
    assert found.value - found.low == pytest.approx(1.96 * found.stderr, rel=0.15)
    assert found.high - found.value == pytest.approx(1.96 * found.stderr, rel=0.15)


def test_a_summary_depends_on_its_seed_and_not_on_the_order_of_tasks():
    tasks = [result("a", 70, 100, baseline=0.25), result("b", 30, 60), result("c", 5, 20)]
    assert summarize("x", tasks) == summarize("x", tasks[::-1])


@pytest.mark.parametrize(("right", "value"), [(0, -1 / 3), (8, 1.0)])
def test_an_interval_ends_where_accuracies_end(right, value):
    found = summarize("x", [result("a", right, 8, 0.25), result("b", right, 8, 0.25)])
    assert found.value == pytest.approx(value)
    assert found.high - found.low > 0.1, "eight of eight is no certainty"
    assert -1 / 3 <= found.low <= found.value <= found.high <= 1


def test_differences_are_of_common_problems():
    """Of problems 5 … 9 the first model solves 5; of the same the second solves 5, 6 and 7."""
    a, b = result(right=6, n=10), result(right=3, n=20, first=5)
    found = paired_difference(a, b)
    assert (found.name, found.n, found.difference) == ("task", 5, pytest.approx(-2 / 5))
    assert found.low < found.difference < found.high
    opposite = paired_difference(b, a)
    assert (opposite.difference, opposite.stderr) == (pytest.approx(2 / 5), pytest.approx(found.stderr))


def test_pairs_are_found_by_name_and_not_by_place():
    a = result(right=6)
    order = random.Random(0).sample(range(10), 10)
    b = make_result("task", [a.items[i] for i in order], [a.outcomes[i] for i in order])
    found = paired_difference(a, b)
    assert found.difference == 0
    assert 0 < found.stderr < a.stderr, "five and five equal answers say less than a thousand"


def test_pairs_say_more_than_two_accuracies():
    """Two models that solve the same problems, but for 20 of 1,000 that only the first solves."""
    a, b = result(right=520, n=1000), result(right=500, n=1000)
    found = paired_difference(a, b)
    assert found.low > 0, "the first is better"
    assert 2 * found.stderr < math.hypot(a.stderr, b.stderr)


def test_no_problem_in_common():
    with pytest.raises(UserError, match="task: the two were not given any problem in common"):
        paired_difference(result(), result(first=10))


def test_difference_of_summaries():
    a = [result("a", 60, 100, baseline=0.2), result("b", 30, 60), result("only here", 3, 4)]
    b = [result("b", 24, 60), result("a", 40, 100, baseline=0.2), result("only there", 3, 4)]
    found = paired_summary("ChatCORE", a, b)
    assert (found.name, found.n) == ("ChatCORE", 160)
    assert found.difference == pytest.approx((0.2 / 0.8 + 0.1) / 2)
    parts = [paired_difference(a[0], b[1]).stderr / 0.8, paired_difference(a[1], b[0]).stderr]
    assert found.stderr == pytest.approx(math.hypot(*parts) / 2)
    assert 0 < found.low < found.difference < found.high
    with pytest.raises(UserError, match="x: the two have no task in common"):
        paired_summary("x", a[2:], b[2:])
    with pytest.raises(UserError, match=r"a: baseline 0\.2 here and 0\.0 there"):
        paired_summary("x", a, [result("a")])


def test_a_result_goes_through_json():
    made = make_result("x", ["a", "ü\ud800"], [1, 1 / 3], details={"pass_at_k": [{"k": 1}]}, answers=[{"item": "a"}])
    assert from_plain(json.loads(json.dumps(to_plain(made))), "x.json") == made


PLAIN = to_plain(result())


def test_figures_that_are_read_are_those_of_the_outcomes():
    assert from_plain({**PLAIN, "accuracy": 0.99, "stderr": 0.0, "centered": 0.9}, "f.json") == result()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"n": 9}, "n=9, 10 different items of 10, 10 outcomes"),
        ({"items": ["a"] * 10}, "1 different items of 10"),
        ({"outcomes": [1.0] * 9}, "9 outcomes"),
        ({"outcomes": [2.0] * 10}, r"f\.json\.outcomes\[0\]=2\.0: is above 1"),
        ({"outcomes": [math.nan] * 10}, r"outcomes\[0\]=nan: must be a number"),
        ({"baseline": 1.0}, r"baseline=1\.0: is above"),
        ({"n": 0, "items": [], "outcomes": []}, r"n=0: is below 1"),
        ({"name": "x" * 1000}, "name: has 1,000 characters"),
        ({"details": {"x": math.inf}}, r"details\.x=inf: must be a finite number"),
        ({"answers": ["text"]}, r"answers\[0\]='text': must be a group of named values"),
        ({"other": 1}, "other: there is no such key"),
    ],
)
def test_what_is_no_result_is_refused(change, problem):
    with pytest.raises(UserError, match=problem):
        from_plain({**PLAIN, **change}, "f.json")


@pytest.mark.parametrize("value", [[], None, {}, "x"])
def test_other_data_is_refused(value):
    with pytest.raises(UserError, match=r"f\.json"):
        from_plain(value, "f.json")


def test_data_of_any_depth_is_refused():
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(UserError, match=r"f\.json: lists and groups within each other"):
        from_plain({**PLAIN, "details": {"x": deep}}, "f.json")
