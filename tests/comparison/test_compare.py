"""Groups of runs of a ledger against the first: what is paired, what is left out, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest

from nanochat_pl.cli._choose_runs import settings_of_results
from nanochat_pl.common.errors import UserError
from nanochat_pl.comparison import Comparison, by_name, by_setting, compare, keep, read_runs
from nanochat_pl.comparison.metrics import more_is_better
from nanochat_pl.ledger import Entry
from tests.comparison.fake_runs import entry_of

BASE = [1.200, 1.205, 1.195, 1.201, 1.198]
WORSE = [1.210, 1.214, 1.206, 1.210, 1.209]
ALIKE = [1.201, 1.204, 1.196, 1.2005, 1.1985]
OFF = {"model.backout": False}


def group(name: str, values: list[float], changed: dict[str, Any] | None = None, **others: Any) -> list[Entry]:
    return [entry_of(f"{name}{seed}", seed, bpb, changed, **others) for seed, bpb in enumerate(values)]


def compared(entries: list[Entry], names: list[str], metrics: tuple[str, ...] = ("val/bpb",), **how: Any) -> Comparison:
    stage, runs, _ = read_runs(entries, None, settings_of_results, names)
    return compare(stage, by_name(runs, names).groups, metrics, **how)


def test_an_ingredient_that_matters_is_worse_without_it() -> None:
    result = compared(group("a", BASE) + group("b", WORSE, OFF), ["a*", "b*"])
    base, row = result.metrics[0].rows
    assert base.verdict == "baseline"
    assert row.verdict == "worse"
    assert row.difference is not None
    assert row.difference.paired
    assert row.difference.value == pytest.approx(0.01)
    assert row.difference.low > 0.008
    assert row.relative == pytest.approx(0.01 / 1.1998, rel=1e-3)
    assert result.settings == {"model.backout": [True, False]}
    assert "b* differs from a* in model.backout (true → false)." in result.remarks


def test_equal_settings_show_no_difference_and_how_many_seeds_would() -> None:
    result = compared(group("a", BASE) + group("b", ALIKE), ["a*", "b*"])
    row = result.metrics[0].rows[1]
    assert row.seeds_needed is not None
    assert row.seeds_needed > 5
    assert row.verdict == f"no difference shown: {row.seeds_needed:,} seeds would be needed"
    assert "no setting that matters differs" in result.remarks[0]


def test_more_of_an_accuracy_is_better() -> None:
    result = compared(group("a", BASE) + group("b", WORSE, OFF), ["a*", "b*"], ("chat/mean", "val/loss"))
    assert [metric.rows[1].verdict for metric in result.metrics] == ["worse", "worse"]
    assert [metric.more_is_better for metric in result.metrics] == [True, False]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("val/bpb", False),
        ("train/loss", False),
        ("seconds", False),
        ("inference.token_ms", False),
        ("inference.tokens_per_second", True),
        ("inference.cache_bytes_per_token", False),
        ("core/mean", True),
        ("best.chat/mean", True),
        ("best.val/bpb", False),
        ("pass_at_1/gsm8k", True),
        ("evaluate/chatcore/ChatCORE", True),
        ("evaluate/bpb/bpb", False),
        ("tokens", None),
    ],
)
def test_which_way_is_better(metric: str, expected: bool | None) -> None:
    assert more_is_better(metric) is expected


def test_one_seed_says_nothing_of_noise() -> None:
    row = compared(group("a", BASE[:1]) + group("b", WORSE[:1], OFF), ["a0", "b0"]).metrics[0].rows[1]
    assert row.difference is None
    assert row.simple_difference == pytest.approx(0.01)
    assert row.verdict == "one seed: nothing can be said of noise"


@pytest.mark.parametrize(
    ("others", "why"),
    [
        ({"tokenizer": "other words"}, "they differ in tokenizer"),
        ({"data": "other rows"}, "they differ in data"),
        ({"data": None}, "the ledger does not say of what data they are"),
        ({"changed": {"model.sequence_len": 1024}}, "they differ in model.sequence_len"),
    ],
)
def test_runs_of_other_rows_are_no_pairs(others: dict[str, Any], why: str) -> None:
    result = compared(group("a", BASE) + group("b", WORSE, **others), ["a*", "b*"])
    difference = result.metrics[0].rows[1].difference
    assert difference is not None
    assert not difference.paired
    assert f"as {why}: Welch's test." in result.remarks[0]


def test_another_batch_size_is_a_pair() -> None:
    result = compared(group("a", BASE) + group("b", WORSE, {"total_batch_tokens": 8192}), ["a*", "b*"])
    assert result.metrics[0].rows[1].difference.paired  # type: ignore[union-attr]


def test_pairs_are_of_the_seeds_that_both_have() -> None:
    result = compared(group("a", BASE) + group("b", WORSE[:3], OFF), ["a*", "b*"])
    assert result.metrics[0].rows[1].difference.n == 3  # type: ignore[union-attr]
    assert "paired with a* by 3 seeds; the difference leaves out a3, a4." in result.remarks[0]


def test_several_variants_share_the_chance_of_a_false_one() -> None:
    """0.6 at random in five of six: one alone would be called better."""
    slight = [value + each for value, each in zip(BASE, (0.001, 0.002, 0.003, 0.0005, 0.0025), strict=True)]
    alone = compared(group("a", BASE) + group("b", slight, OFF), ["a*", "b*"]).metrics[0].rows[1]
    assert alone.verdict == "worse"
    others = [entry for n in range(4) for entry in group(f"c{n}-", ALIKE, {"optim.muon.beta2": 0.5 + n / 10})]
    entries = group("a", BASE) + group("b", slight, OFF) + others
    row = compared(entries, ["a*", "b*", *(f"c{n}-*" for n in range(4))]).metrics[0].rows[1]
    assert row.adjusted_p == pytest.approx(5 * alone.adjusted_p)  # type: ignore[operator]
    assert row.verdict.startswith("no difference shown: ")


def test_looking_after_every_seed_takes_more() -> None:
    entries = group("a", BASE) + group("b", WORSE, OFF)
    fixed, looked = (compared(entries, ["a*", "b*"], sequential=each).metrics[0].rows[1] for each in (False, True))
    assert fixed.difference is not None
    assert looked.difference is not None
    assert looked.difference.high > fixed.difference.high
    assert looked.difference.value == fixed.difference.value
    row = compared(entries, ["a*", "b*"], ("tokens",), sequential=True).metrics[0].rows[1]
    assert row.verdict == "no difference: the means are equal"


def test_runs_that_are_no_pairs_can_be_looked_at_too() -> None:
    result = compared(group("a", BASE) + group("b", WORSE[:4], data="other rows"), ["a*", "b*"], sequential=True)
    difference = result.metrics[0].rows[1].difference
    assert difference is not None
    assert (difference.paired, difference.n) == (False, 4)


def test_code_that_differs_is_a_warning() -> None:
    entries = group("a", BASE) + group("b", WORSE, OFF, git={"commit": "fedcba987", "dirty": True})
    remarks = compared(entries, ["a*", "b*"]).remarks
    assert "Warning: the runs are of different code: abc1234 (5 of a*), fedcba9 with changes (5 of b*)." in remarks
    assert remarks[-1].startswith("Warning: code with changes that are not committed")


def test_a_group_of_different_settings_is_refused() -> None:
    with pytest.raises(UserError, match=r"x\*: its runs differ in more than their seed: model.backout \(true, false\)"):
        compared(group("x", BASE) + group("xb", WORSE, OFF) + group("y", BASE), ["x*", "y*"])


def test_irrelevant_settings_are_no_difference() -> None:
    entries = group("a", BASE) + group("b", ALIKE, {"trainer.num_threads": 2, "paths.runs": "elsewhere"})
    assert compared(entries, ["a*", "b*"]).settings == {}
    entries = group("a", BASE) + group("b", ALIKE, {"evaluation.num_rows": 7})
    assert compared(entries, ["a*", "b*"]).settings == {"evaluation.num_rows": [None, 7]}


def test_groups_by_a_setting_begin_with_the_default() -> None:
    entries = group("b", WORSE, OFF) + group("a", BASE) + group("c", BASE, {"model.depth": 6})
    _, runs, _ = read_runs(entries, "base", settings_of_results)
    with pytest.raises(UserError, match=r"model\.depth \(12, 6\)"):
        by_setting(runs, "model.backout")
    groups = by_setting(keep(runs, "model.depth=12"), "model.backout").groups
    assert [each.label for each in groups] == ["model.backout=true", "model.backout=false"]
    assert [len(each.runs) for each in groups] == [5, 5]
    assert [each.label for each in by_setting(runs, None).groups][1:] == ["model.backout=false", "model.depth=6"]


def test_the_settings_of_a_parent_count_and_can_be_chosen() -> None:
    entries = group("a", BASE) + group("b", WORSE, OFF) + group("a", BASE, stage="sft") + group("b", WORSE, stage="sft")
    stage, runs, _ = read_runs(entries, None, settings_of_results)
    assert stage == "sft"
    groups = by_setting(runs, "model.backout").groups
    assert [each.label for each in groups] == ["model.backout=true", "model.backout=false"]
    assert compare(stage, groups, ["val/bpb"]).settings == {"base: model.backout": [True, False]}


def test_runs_are_chosen_as_the_command_runs_chooses_entries() -> None:
    entries = (
        group("a", BASE[:2]) + group("b", WORSE[:2], {"model.depth": 2}) + group("c", BASE[:2], {"model.depth": 4})
    )
    _, runs, _ = read_runs(entries, "base", settings_of_results)

    def names(where: str) -> str:
        return "".join(sorted({run.name[0] for run in keep(runs, where)}))

    assert names("model.depth=2,4") == "bc"
    assert names("model.depth!=2,4") == "a"
    assert names("model.depth<=4 and val/bpb<1.205") == "c"
    assert names("run=b*,c1") == "bc"


def test_the_newest_entry_of_a_stage_counts_and_unfinished_ones_are_left_out() -> None:
    entries = [
        entry_of("a0", 0, 9.0, exit="stopped"),
        entry_of("a0", 0, 1.2),
        entry_of("a1", 1, 1.3, exit="failed", error="out of memory"),
        entry_of("a2", 0, 1.4),
    ]
    _, runs, remarks = read_runs(entries, None, settings_of_results)
    assert remarks == ["Left out, as base is not finished: a1 (failed: out of memory)."]
    chosen = by_name(runs, ["a*"])
    assert [run.name for run in chosen.groups[0].runs] == ["a2"]
    assert "another run has the seed of a0" in chosen.remarks[0]


@pytest.mark.parametrize(
    ("names", "where", "message"),
    [
        (["d4-sed*"], "run=*", "no run fits it; did you mean d4-seed"),
        (["d4"], "run=*", "did you mean 'd4*'?"),
        ([], "model.dept=4", "no entry has such a column; did you mean model.depth"),
        ([], "model.depth=5", "model.depth=5: no run of stage base has it; there are: 12."),
        ([], "model.depth=12 and model.depth=5,6", "model.depth=5,6: no run of stage base has it; there are: 12."),
    ],
)
def test_what_is_not_there_is_named(names: list[str], where: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        keep(read_runs(group("d4-seed", BASE[:3]), None, settings_of_results, names)[1], where)
    assert message in str(caught.value)


def test_a_metric_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"metrics=val/bbp: no run has it; did you mean val/bpb\?"):
        compared(group("a", BASE), ["a*"], ("val/bbp",))
