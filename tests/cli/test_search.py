"""Searches: what is searched over, what the ledger tells, several workers, pruning; no trial is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nanochat_pl.cli import search
from nanochat_pl.cli._study import Study, Trial, best_of
from nanochat_pl.cli.run_record import flat
from nanochat_pl.cli.search import study_of
from nanochat_pl.cli.train import compose_train, place_of
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import write_json
from nanochat_pl.config.overrides import split_override
from nanochat_pl.config.search_space import Choice, Interval, split_space, text_of
from nanochat_pl.ledger import Entry, append, read_ledger

pytest.importorskip("optuna")
LR = "optim.matrix_lr=tag(log,interval(0.001,1.0))"
FEW = ["search.trials=4", "search.random_trials=2", "model.depth=2", "run=lr"]


def pretend(here: Path, arguments: Sequence[str], bits: float | None, exit: str = "finished") -> None:
    """What a training of these keys leaves in the ledger, and in its folder if it is finished."""
    composed = compose_train(arguments)
    folder = place_of(composed)
    folder.create()
    metrics = {} if bits is None else {"val/bpb": bits}
    if exit == "finished":
        write_json(folder.path / "finished.json", {"step": 1, "metrics": metrics, "seconds": 1.0})
    settings = flat(composed.plain())
    append(
        here / "runs",
        Entry(folder.run, folder.stage, exit, "2026-11-29T00:00:00+00:00", settings=settings, metrics=metrics),
    )  # type: ignore[arg-type]


def value_of(arguments: Sequence[str], key: str) -> str:
    return {found: raw for found, raw, _ in map(split_override, arguments)}[key]


@pytest.fixture
def trained(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines of all trials; each ends with its distance from 0.1."""
    commands: list[list[str]] = []

    def fake(arguments: list[str], parent: int | None, log: Path, watch: Callable[[], bool] | None) -> int:
        commands.append(arguments[1:])
        pretend(here, arguments[1:], abs(float(value_of(arguments, "optim.matrix_lr")) - 0.1))
        return 0

    monkeypatch.setattr(search, "run_child", fake)
    return commands


def test_the_space_is_written_in_hydras_grammar() -> None:
    texts = [
        "seed=7",
        LR,
        "optim.scalar_lr=0.1,0.5,null",
        "model.depth=range(2,9,2)",
        "schedule.warmup_steps=int(interval(0,80))",
        "schedule.warmdown=choice(linear,cosine)",
        "schedule.warmdown_ratio=range(0.1,0.5,0.1)",
        "trainer.compile=true,false",
    ]
    fixed, space = split_space(texts)
    assert fixed == ["seed=7"]
    assert space == {
        "optim.matrix_lr": Interval(0.001, 1.0, is_log=True),
        "optim.scalar_lr": Choice((0.1, 0.5, None)),
        "model.depth": Interval(2, 8, step=2),
        "schedule.warmup_steps": Interval(0, 80),
        "schedule.warmdown": Choice(("linear", "cosine")),
        "schedule.warmdown_ratio": Interval(0.1, 0.4, step=0.1),
        "trainer.compile": Choice((True, False)),
    }
    assert [text_of("a", value) for value in (None, True, 0.5, "x")] == ["a=null", "a=true", "a=0.5", "a=x"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model.depth=2"], "search: no key has several values"),
        ([LR, "experiment=tiny,demo"], "experiment=tiny,demo: names the trials, and is not searched over"),
        (["optim=nanochat,clasic_muon,nanochat_2025_10"], "clasic_muon"),
        (["optim.matrix_lr=interval(a,b)"], "optim.matrix_lr=interval(a,b.: is no way to say what is tried"),
        ([LR, LR], "optim.matrix_lr has been given before"),
        (["optim.matrix_lr=tag(log,interval(0,1))"], "cannot be searched over"),
        (["optim.matrix_lr=interval(-1,1)"], "optim.matrix_lr"),
        (["optim.matrix_lr=glob(*)"], "cannot be searched over"),
        (["optim.matirx_lr=interval(0.1,1)"], "did you mean optim.matrix_lr"),
        ([LR, "search.trials=0"], "search.trials"),
        ([LR, "search.trails=3"], "did you mean"),
        ([LR, "search.metric=val/bbp"], "search.metric=val/bbp: is not measured; did you mean val/bpb"),
        (
            [LR, "search.metric=core/mean", "evaluation.core_every_steps=null"],
            "search.metric=core/mean: is not measured with",
        ),
        ([LR, "stage=sft"], "search: the stage sft is not searched over, base is"),
    ],
)
def test_searches_that_make_no_sense(arguments: list[str], expected: str, here: Path) -> None:
    with pytest.raises(UserError, match=expected.replace("(", r"\(").replace("*", r"\*")):
        study_of(arguments)
    assert list(here.iterdir()) == []


def test_a_search_goes_on_from_the_ledger(
    here: Path, trained: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert search.run([LR, *FEW]) == 0
    assert [value_of(each, "run") for each in trained] == [f"lr-trial{n}" for n in (1, 2, 3, 4)]
    said = capsys.readouterr().out
    best = min(trained, key=lambda each: abs(float(value_of(each, "optim.matrix_lr")) - 0.1))
    assert said.splitlines()[-1].startswith(
        f"The best is {value_of(best, 'run')}: nanochat-pl train model.depth=2 optim"
    )
    assert search.run([LR, *FEW]) == 0 and len(trained) == 4, "there are enough"
    for file in (here / "runs" / ".sweeps").glob("*/trials.json"):
        file.unlink()
    assert search.run([LR, *FEW, "search.trials=6"]) == 0
    assert [value_of(each, "run") for each in trained[4:]] == ["lr-trial5", "lr-trial6"]
    study, _ = study_of([LR, *FEW])
    trials = study.trials()
    assert len(trials) == 6 and len({each.params["optim.matrix_lr"] for each in trials}) == 6
    assert best_of(trials, "minimize") == min(trials, key=lambda each: each.value or 0)
    assert best_of(trials, "maximize") == max(trials, key=lambda each: each.value or 0)


def test_files_of_a_group_are_searched_over(here: Path, trained: list[list[str]]) -> None:
    keys = ["optim=nanochat,classic_muon", "optim.matrix_lr=0.1,0.3", *FEW, "search.sampler=random"]
    assert search.run(keys) == 0 and search.run(keys) == 0 and len(trained) == 4
    chosen = [value_of(each, "optim") for each in trained]
    assert set(chosen) <= {"nanochat", "classic_muon"}
    study, _ = study_of(keys)
    assert [each.params["optim"] for each in study.trials()] == chosen
    assert not any(key.startswith("optim.") for key in study.fixed) and "model.depth" in study.fixed


def test_tpe_has_learnt_where_good_values_are(here: Path, trained: list[list[str]]) -> None:
    assert search.run([LR, *FEW, "search.trials=24", "search.random_trials=8"]) == 0
    distances = [each.metrics["val/bpb"] for each in read_ledger(here / "runs")]
    assert min(distances[8:]) < min(distances[:8]) / 10


def test_other_settings_are_no_comparison(here: Path, trained: list[list[str]]) -> None:
    assert search.run([LR, *FEW, "search.trials=1"]) == 0
    with pytest.raises(UserError, match=r"seed=7: the trial lr-trial1 had seed=42\.\n.*another search with run=NEW"):
        search.run([LR, *FEW, "seed=7"])
    assert search.run([LR, *FEW, "search.trials=1", "trainer.log_every_steps=5"]) == 0, "it has no say in the value"


def test_what_was_stopped_goes_on_and_what_failed_counts(
    here: Path, trained: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = search.run_child
    codes = iter([143, 2])

    def fails(arguments: list[str], parent: int | None, log: Path, watch: Any) -> int:
        code = next(codes, 0)
        if code == 0:
            return int(real(arguments, parent, log, watch))
        trained.append(arguments[1:])
        log.write_text("error: so it was\n", encoding="utf-8")
        if code == 143:
            pretend(here, arguments[1:], None, "stopped")
        return code

    monkeypatch.setattr(search, "run_child", fails)
    assert search.run([LR, *FEW, "search.trials=3"]) == 143
    assert search.run([LR, *FEW, "search.trials=3"]) == 0
    assert [value_of(each, "run") for each in trained] == ["lr-trial1", "lr-trial1", "lr-trial2", "lr-trial3"]
    assert trained[0] == trained[1], "the same values"
    said = capsys.readouterr().out
    assert "trial 1: failed" in said and "  error: so it was" in said
    study, _ = study_of([LR, *FEW])
    assert [each.state for each in study.trials()] == ["failed", "finished", "finished"]


def test_workers_share_the_trials(here: Path, trained: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """While one trains, another takes the next trial, and then there are enough."""
    real, depth = search.run_child, []

    def another(arguments: list[str], *rest: Any) -> int:
        if len(depth) < 2:
            depth.append(1)
            # A lock keeps other processes out, and not this one: the trial that is under way is said to be held.
            with monkeypatch.context() as patch:
                patch.setattr(Study, "abandoned", lambda self, trials: None)
                assert search.run([LR, *FEW, "search.trials=3"]) == 0
        return int(real(arguments, *rest))

    monkeypatch.setattr(search, "run_child", another)
    assert search.run([LR, *FEW, "search.trials=3"]) == 0
    assert sorted(value_of(each, "run") for each in trained) == ["lr-trial1", "lr-trial2", "lr-trial3"]
    assert len({value_of(each, "optim.matrix_lr") for each in trained}) == 3


def test_what_is_worse_than_the_median_is_stopped(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = []

    def fake(arguments: list[str], parent: int | None, log: Path, watch: Callable[[], bool]) -> int:
        folder = place_of(compose_train(arguments[1:]))
        folder.create()
        write_json(folder.path / "about.json", {})
        number = int(folder.run.removeprefix("lr-trial"))
        bits = 3.0 if number == 4 else 1.0 - number / 100
        for lines in ("0,9\n", "0,9\n10,", f"0,9\n10,{bits + 1}\n"):
            (folder.path / "metrics.csv").write_text(f"step,val/bpb\n{lines}", encoding="utf-8")
            if watch():
                stopped.append(number)
                pretend(here, arguments[1:], None, "stopped")
                return 143
        pretend(here, arguments[1:], bits)
        return 0

    monkeypatch.setattr(search, "run_child", fake)
    keys = [LR, *FEW, "search.trials=5", "search.prune_after=2"]
    assert search.run(keys) == 0 and search.run(keys) == 0
    assert stopped == [4]
    assert "trial 4: pruned, val/bpb 4.0000; the best so far: trial 3, 0.9700" in capsys.readouterr().out
    study, _ = study_of(keys)
    assert [each.state for each in study.trials()] == [*["finished"] * 3, "pruned", "finished"]
    assert study.trials()[3] == Trial(4, study.trials()[3].params, "pruned", 4.0)
    assert not study_of([*keys, "search.prune=false"])[0].measured(1)
    assert not study_of([*keys, "search.metric=core/mean"])[0].measured(1)


def test_a_metric_that_is_not_measured(here: Path, trained: list[list[str]]) -> None:
    with pytest.raises(
        UserError, match=r"search\.metric=core/mean: the run lr-trial1 has not measured it\.\nIt has val/bpb"
    ):
        search.run([LR, *FEW, "search.metric=core/mean"])


def test_other_keys_under_the_same_name_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials that failed before they trained are in the file of the trials alone, and ended in a KeyError."""
    monkeypatch.setattr(search, "run_child", lambda *given: 2)
    search.run(["model.depth=2,4", "search.trials=2", "search.random_trials=1", "run=lr"])
    with pytest.raises(UserError, match=r"its trials searched model.depth, not optim.matrix_lr"):
        search.run([LR, *FEW])
