"""From the command line to settings: what is said of mistakes, and free text that arrives as it was typed."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from nanochat_pl.cli.chat import ChatConfig
from nanochat_pl.cli.evaluate_settings import EvaluateConfig
from nanochat_pl.cli.plan import PlanConfig
from nanochat_pl.cli.train import compose_train
from nanochat_pl.common.errors import UserError
from nanochat_pl.config import config_dir
from nanochat_pl.config.compose import compose, groups_of
from nanochat_pl.model.config import ModelSettings
from nanochat_pl.training import lightning_callbacks
from nanochat_pl.training.config import TrainConfig
from tests.config.nasty import NASTY


def problems(*overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        compose_train(overrides)
    return list(caught.value.problems)


def test_nothing_given_is_the_default_of_every_settings_class() -> None:
    config = compose_train([]).config
    assert config.model == ModelSettings()
    assert (config.stage.name, config.stage.parent) == ("base", "tokenizer")
    assert list(config.logger) == ["tensorboard"]


def test_values_groups_and_their_order() -> None:
    config = compose_train(["model.depth=7", "model=tiny", "+seed=3", "++max_steps=20", "optim.matrix_lr=1e-3"]).config
    assert (config.model.depth, config.model.head_dim) == (7, 64), "a key weighs more than a group's file"
    assert (config.seed, config.max_steps, config.optim.matrix_lr) == (3, 20, 1e-3)


def test_stage_sets_its_schedule_and_the_command_line_wins() -> None:
    config = compose_train(["stage=sft", "schedule.warmup_steps=5"]).config
    assert (config.stage.name, config.stage.parent) == ("sft", None)
    assert (config.schedule.initial_lr_fraction, config.schedule.warmup_steps) == (0.8, 5)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.dpeth=4", "model.dpeth: there is no such key; did you mean model.depth?"),
        ("modle.depth=4", "modle: there is no such key; did you mean model?"),
        ("max_step=4", "max_step: there is no such key; did you mean max_steps?"),
        ("+model.dpeth=4", "model.dpeth: there is no such key"),
        ("promt=What's this, {then}?", "promt: there is no such key"),
        ("model.depth=abc", "model.depth='abc': must be a whole number."),
        ("model.depth=3.5", "model.depth=3.5: must be a whole number."),
        ("model.depth=null", "model.depth=None: must be a whole number."),
        ("model.depth=0", "model.depth=0: is below 1."),
        ("model.depth.x=3", "model.depth="),
        ("resume=nver", "resume='nver': must be one of auto, never."),
        (
            "stage=bsae",
            "stage=bsae: there is no such choice; did you mean base? There are: base, mid, rl, sft, tokenizer.",
        ),
        ("data=pyhton_docs", "data=pyhton_docs: there is no such choice; did you mean python_docs?"),
        ("model=5", "model=5: there is no such choice"),
        ("model.head_dim=[1,2", "model.head_dim=[1,2: the value cannot be read"),
        ("model.depth=2,4", "model.depth=2,4: several values for one key need -m"),
        ("model.depth", "model.depth: is not of the form key=value."),
        ("run=", "run='': is not a valid run name. Use letters"),
        ("--model.depth=4", "--model.depth=4: options are written key=value, without dashes"),
        ("~model.dpeth", "~model.dpeth: there is nothing of that name to delete."),
        ("~model.depth=4", "~model.depth=4: write ~model.depth, without a value."),
        ("=4", "=4: '' is no key"),
        ("model depth=4", "model depth=4: 'model depth' is no key"),
        ("seed=${nothing.here}", "seed: Interpolation key 'nothing.here' not found"),
        ("data=local", "data.path: is missing"),
        ("logger.mine._target_=os.system", "logger.mine._target_='os.system': there is no such class"),
        ("callbacks={x: {_target_: os.system}}", "callbacks.x._target_='os.system': there is no such class"),
    ],
)
def test_a_mistake_is_named(override: str, expected: str) -> None:
    found = problems(override)
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_all_mistakes_are_named_at_once() -> None:
    found = problems("model.dpeth=4", "model.depth=abc", "stage=bsae", "foo", "optim.matrix_lr=-1", "seed=[1")
    assert len(found) == 6
    for part in ("dpeth", "'abc'", "bsae", "foo", "matrix_lr", "seed=[1"):
        assert any(part in line for line in found), part


def test_mistakes_of_group_files_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("dephh: 3\n", encoding="utf-8")
    (tmp_path / "plan.yaml").write_text("defaults: [{model: mine}, _self_]\n", encoding="utf-8")
    monkeypatch.setattr(config_dir, "config_folder", lambda: tmp_path)
    with pytest.raises(UserError) as caught:
        compose("plan", PlanConfig)
    assert (
        "model.dephh: there is no such key; did you mean model.depth? (configs/model/mine.yaml)"
        in caught.value.problems
    )


@pytest.mark.parametrize("text", NASTY)
def test_free_text_arrives_as_it_was_typed(text: str) -> None:
    assert compose("chat", ChatConfig, [f"prompt={text}"]).config.prompt == text


@pytest.mark.parametrize("text", [text for text in NASTY if text not in ("", "null", "~") and "\0" not in text])
def test_paths_arrive_as_they_were_typed(text: str) -> None:
    assert compose_train(["data=local", f"data.path=x{text}"]).config.data.path == f"x{text}"
    assert compose("chat", ChatConfig, [f"bundle={text}", f"paths.runs={text}"]).config.bundle == text


def test_random_text_arrives_as_it_was_typed() -> None:
    letters = "ab 1'\"\\${}[]()=,:~!#%&*?<>|@-\n\tßж🙂"
    generator = random.Random(0)
    for _ in range(20):
        prompt, stage, bundle, runs = (
            "".join(generator.choices(letters, k=generator.randrange(1, 30))) for _ in range(4)
        )
        texts = [f"prompt={prompt}", f"stage={stage}", f"bundle={bundle}", f"paths.runs={runs}"]
        config = compose("chat", ChatConfig, texts).config
        assert (config.prompt, config.stage, config.bundle, config.paths.runs) == (prompt, stage, bundle, runs)


def test_null_is_no_text_but_for_a_prompt() -> None:
    config = compose("chat", ChatConfig, ["run=null", "prompt=null"]).config
    assert (config.run, config.prompt) == (None, "null")


def test_lists_and_dictionaries_are_read_with_hydras_grammar() -> None:
    config = compose_train(["evaluation.sample_prompts=['a, b', c]", "mixture.tasks={spelling: {size: 3}}"]).config
    assert config.evaluation.sample_prompts == ["a, b", "c"]
    assert config.mixture.tasks.spelling is not None
    assert config.mixture.tasks.spelling.size == 3


def test_given_keys_are_those_that_a_person_set() -> None:
    given = compose_train(["model=tiny", "max_steps=3"]).given
    assert {"model.depth", "model.head_dim", "max_steps"} <= given
    assert "data.name" not in given


def test_a_group_in_braces_gives_its_keys() -> None:
    """A later stage holds the keys that were given against its parent's."""
    composed = compose_train(["model={depth: 4, head_dim: 32}", "schedule={}"])
    assert (composed.config.model.depth, composed.config.model.head_dim) == (4, 32)
    assert {"model.depth", "model.head_dim"} <= composed.given


@pytest.mark.parametrize("nothing", ["null", "[]"])
def test_no_loggers(nothing: str) -> None:
    assert compose_train([f"logger={nothing}"]).config.logger == {}
    assert "logger.x" in problems(f"logger={nothing}", "logger.x.y=3")[0]


def test_home_is_expanded_in_the_names_of_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The shell leaves ~ alone in paths.runs=~/runs, and a folder named ~ was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = compose("evaluate", EvaluateConfig, ["bundle=~/b", "to=~", "paths.runs=~/r", "paths.cache=~/c/~"]).config
    found = (config.bundle, config.to, config.paths.runs, config.paths.cache)
    assert found == (f"{tmp_path}/b", str(tmp_path), f"{tmp_path}/r", f"{tmp_path}/c/~")
    assert compose("chat", ChatConfig, ["prompt=~/b"]).config.prompt == "~/b"


def test_every_group_file_composes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shipped choice is read, checked, and fits its settings class; as if all extras were installed."""
    monkeypatch.setattr(lightning_callbacks, "_is_installed", lambda *names: True)
    needs = {
        "data=custom": ["data.target=x.Y"],
        "data=local": ["data.path=x"],
        "data=hub": ["data.repo=a/b"],
        "mixture=own": ["mixture.tasks.conversations.mine.path=x"],
    }
    groups = groups_of(TrainConfig)
    overrides = [
        [f"{group}=[{choice}]" if group in ("logger", "callbacks") else f"{group}={choice}" for choice in choices]
        for group, choices in groups.items()
    ]
    assert sum(map(len, overrides)) > 28
    for together in itertools.zip_longest(*overrides):  # of each group another one: composing takes its time
        chosen = [override for override in together if override is not None]
        compose_train([*chosen, *(text for override in chosen for text in needs.get(override, []))])


def test_composition_does_not_depend_on_the_current_folder(here: Path) -> None:
    (here / "configs").mkdir()
    assert compose_train([]).config.model.depth == 12


def test_a_checkout_reads_its_own_files_and_not_the_copies_of_an_installation() -> None:
    """An editable installation leaves copies of configs/ in site-packages, which grow old."""
    root = Path(__file__).resolve().parents[2]
    assert config_dir.config_folder() == root / "configs"
    assert config_dir.experiment_folder() == root / "conf_experiments"
