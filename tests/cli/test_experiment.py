"""Experiment files: what they set, what the command line overrules, and where their mistakes are."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat_pl.cli.pipeline import check_all, run_folder_of, steps_of
from nanochat_pl.cli.train import compose_train, place_of
from nanochat_pl.common.errors import UserError
from nanochat_pl.config import config_dir
from nanochat_pl.config.experiment import read_experiment

MINE = """# @package _global_
description: for a test
defaults:
  - override /model: tiny
  - _self_
pipeline: [tokenizer, base, sft, evaluate, report]
model.depth: 3
total_batch_tokens: 1024
run: "a-run"
stages:
  base:
    max_steps: 7
    optim: {matrix_lr: 0.5}
    data.text_column: "'any' {text}, of=mine"
    device_batch_size: ${model.depth}
  evaluate: {limit: 3}
"""


@pytest.fixture
def mine(here: Path) -> str:
    (here / "mine.yaml").write_text(MINE, encoding="utf-8")
    return "mine.yaml"


def test_sections_are_laid_over_each_other(mine: str) -> None:
    config = compose_train([f"experiment={mine}", "stage=base", "max_steps=9"]).config
    assert (config.model.depth, config.model.head_dim) == (3, 64)
    assert (config.max_steps, config.optim.matrix_lr, config.total_batch_tokens) == (9, 0.5, 1024)
    sft = compose_train([f"experiment={mine}", "stage=sft"]).config
    assert (sft.stage.name, sft.max_steps, sft.optim.matrix_lr) == ("sft", None, None)


def test_a_group_chosen_on_the_command_line_is_that_group(mine: str) -> None:
    """The experiment's keys of the group were laid over the file that the command line had chosen."""
    config = compose_train([f"experiment={mine}", "model=tiny", "optim=nanochat"]).config
    assert (config.model.depth, config.optim.matrix_lr) == (4, None)
    assert (config.max_steps, config.total_batch_tokens) == (7, 1024), "other keys stay"
    assert compose_train([f"experiment={mine}", "model=tiny", "model.depth=5"]).config.model.depth == 5


def test_a_file_of_the_older_form_means_the_same(here: Path, mine: str) -> None:
    older = "shared: {model: tiny, model.depth: 3, total_batch_tokens: 1024}\nstages: {base: {max_steps: 9}}\n"
    (here / "older.yaml").write_text(older, encoding="utf-8")
    config = compose_train(["experiment=older.yaml"]).config
    assert (config.model.depth, config.model.head_dim, config.total_batch_tokens, config.max_steps) == (3, 64, 1024, 9)


def test_text_is_text_and_interpolations_are_resolved(mine: str) -> None:
    config = compose_train([f"experiment={mine}"]).config
    assert config.data.text_column == "'any' {text}, of=mine"
    assert config.device_batch_size == 3


def test_an_experiment_has_all_of_another_one(here: Path, mine: str) -> None:
    (here / "own" / "experiment").mkdir(parents=True)
    (here / "own" / "experiment" / "first.yaml").write_text(MINE, encoding="utf-8")
    second = "defaults: [first, {override /optim: classic_muon}]\nmodel: {depth: 5}\nstages: {base: {max_steps: 8}}\n"
    (here / "own" / "experiment" / "second.yaml").write_text(second, encoding="utf-8")
    with config_dir.chosen("own", None):
        config = compose_train(["experiment=second"]).config
        steps = [step.name for step in steps_of(["experiment=second"])]
        (here / "own" / "experiment" / "first.yaml").write_text("defaults: [second]", encoding="utf-8")
        with pytest.raises(UserError, match="has all of itself: second → first → second"):
            compose_train(["experiment=second"])
    assert (config.model.depth, config.model.head_dim, config.max_steps) == (5, 64, 8)
    assert (config.optim.matrix_lr, config.optim.muon.orthogonalization) == (0.5, "newton_schulz")
    assert steps == ["tokenizer", "base", "sft", "evaluate", "report"]
    with pytest.raises(UserError, match="experiment='second': there is no such experiment"):
        compose_train(["experiment=second"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("settings: {max_steps: 77}\n", "settings: there is no such key"),
        ("model.depth: 3\nmodel[depth]: 5\n", "model[depth]: is no key"),
        ("[]\n", "must be a group of settings"),
        ("stage: sft\n", "stage: is named on the command line"),
        ("defaults: [override /stage: sft]\n", "stage: is named on the command line"),
        ("pipeline: [base, base]\n", "pipeline: base: more than once"),
        ("defaults: [nowhere/e.yaml]\n", "odd.yaml, defaults: experiment=nowhere/e.yaml: there is no such file"),
    ],
)
def test_odd_experiments_are_refused(here: Path, text: str, said: str) -> None:
    (here / "odd.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        compose_train(["experiment=odd.yaml"])
    assert said in "\n".join(caught.value.problems)


def test_experiments_that_have_each_other_are_read_once(here: Path) -> None:
    for number in range(40):
        (here / f"x{number}.yaml").write_text(
            f"defaults: [x{number + 1}.yaml, ./x{number + 1}.yaml]\n", encoding="utf-8"
        )
    (here / "x40.yaml").write_text("max_steps: 3\n", encoding="utf-8")
    assert compose_train(["experiment=x0.yaml"]).config.max_steps == 3
    for number in range(40, 60):
        (here / f"x{number}.yaml").write_text(f"defaults: [x{number + 1}.yaml]\n", encoding="utf-8")
    with pytest.raises(UserError, match="has all of more than 50 files"):
        compose_train(["experiment=x0.yaml"])


def test_the_run_is_named_after_the_experiment(here: Path) -> None:
    assert place_of(compose_train(["experiment=tiny"])).run == "tiny"
    assert place_of(compose_train(["experiment=tiny", "run=other"])).run == "other"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (
            "max_steps: 7",
            "max_stps: 7",
            "max_stps: there is no such key; did you mean max_steps? (mine.yaml, stages.base)",
        ),
        ("matrix_lr: 0.5", "matrix_lr: fast", "optim.matrix_lr='fast': must be a number. (mine.yaml, stages.base)"),
        ("/model: tiny", "/model: tyny", "model=tyny: there is no such choice; did you mean tiny?"),
        ("/model: tiny", "/modl: tiny", "modl: there is no such key; did you mean model?"),
        ("override /model: tiny", "[model, tiny]", "mine.yaml: defaults: ['model', 'tiny'] is not understood"),
        ("- _self_", "- nowhere", "mine.yaml, defaults: experiment='nowhere': there is no such experiment"),
        (
            "model.depth: 3",
            "model.dpth: 3",
            "model.dpth: there is no such key; did you mean model.depth? (mine.yaml)",
        ),
        (
            "${model.depth}",
            "${model.dpth}",
            "device_batch_size: Interpolation key 'model.dpth' not found (mine.yaml, stages.base)",
        ),
        ("stages:", "stagse:", "stagse: there is no such key; did you mean stage?"),
        ("[tokenizer, base,", "[tokenizer, bsae,", "mine.yaml: pipeline: 'bsae' is no step; did you mean base?"),
        (
            "[tokenizer, base,",
            "[tokenizer, dpo,",
            "mine.yaml: pipeline: 'dpo' is no step; valid: base, evaluate, mid, report, rl, sft",
        ),
        ("  evaluate: {", "  stf: {", "mine.yaml: stages.stf: is no step; did you mean sft?"),
        ("  evaluate: {", "  evalaute: {", "mine.yaml: stages.evalaute: is no step"),
        ("pipeline: [", "pipeline: [[", "mine.yaml: is no YAML: expected ',' or ']', but got '<scalar>' in line 7."),
    ],
)
def test_mistakes_name_file_and_key(here: Path, before: str, after: str, expected: str) -> None:
    (here / "mine.yaml").write_text(MINE.replace(before, after), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        check_all(steps_of(["experiment=mine.yaml"]))
    assert any(problem.startswith(expected) for problem in caught.value.problems), caught.value.problems


def test_missing_experiments_name_the_nearest() -> None:
    with pytest.raises(UserError, match="experiment=: names none"):
        compose_train(["stage=base", "experiment="])
    with pytest.raises(UserError, match="experiment='dmo': there is no such experiment; did you mean demo"):
        read_experiment("dmo")
    with pytest.raises(UserError, match="there is no such file"):
        read_experiment("nowhere/x.yaml")


@pytest.mark.slow
def test_every_shipped_experiment_composes_in_all_of_its_steps(here: Path) -> None:
    """Of the ablations, which are one step each and differ in a key, test_experiments_shrunk.py trains every one."""
    assert {"demo", "demo_rl", "nanochat", "nanochat_2025_10", "nanochat_2026_02", "tiny"} <= set(
        config_dir.experiments()
    )
    for name in config_dir.experiments():
        if name.startswith("ablations/") and name != "ablations/no_windows":
            continue
        steps = steps_of([f"experiment={name}"])
        composed = check_all(steps)
        if name in ("demo", "demo_rl", "nanochat", "tiny"):
            names = [step.name for step in steps if step.name != "mid"]
            assert names == [
                "tokenizer",
                "base",
                "sft",
                *(["rl"] if name in ("demo_rl", "tiny") else []),
                "evaluate",
                "report",
            ]
        assert run_folder_of(composed) == Path("runs") / Path(name).name
