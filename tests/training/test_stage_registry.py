"""Which stages there are, what each says of itself, and what other packages add."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from nanochat_pl.cli.train import compose_train
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.run_dir import STAGES
from nanochat_pl.training.config import StageSettings
from nanochat_pl.training.stages.registry import REGISTRY, Stage, all_stages, parents_of, stage, stage_named
from nanochat_pl.training.stages.sft import Sft

POLISH = """
from nanochat_pl.training.stages.registry import stage
from nanochat_pl.training.stages.sft import Sft

@stage("polish")
class Polish(Sft):
    '''Fine-tuning once more.'''
    parents = ("sft",)
    before = ("mid",)
"""


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A registry that is as it was again afterwards, and a folder for modules."""
    monkeypatch.setattr(REGISTRY, "entries", dict(REGISTRY.load()))
    monkeypatch.setattr(REGISTRY, "classes", dict(REGISTRY.classes))
    monkeypatch.setattr(REGISTRY, "loaded", True)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("polish_module", None)


def test_the_stages_of_the_package_are_there_in_their_order() -> None:
    names = [name for name in all_stages() if name in STAGES]
    assert names == ["tokenizer", "base", "mid", "sft", "rl"]
    for name, found in all_stages().items():
        assert found.name == name and found.help and found.help.endswith("."), "--help shows it"
        assert set(parents_of(found)) <= set(all_stages())


def test_stages_are_listed_without_what_they_train_with() -> None:
    """`runs` and `--help` know the stages, and load neither torch nor Lightning for it."""
    program = (
        "import sys\n"
        "from nanochat_pl.training.stages.registry import all_stages\n"
        "assert 'sft' in all_stages()\n"
        "import nanochat_pl.cli.runs\n"
        "assert not {'torch', 'lightning', 'pyarrow'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_are_keys_and_each_has_one_stage(fresh: Path) -> None:
    for name in ("Domain", "my-stage", "a.b", "", "evaluation", "report", "doctor", "evaluate"):
        with pytest.raises(UserError, match="a stage's name has small letters"):
            stage(name)
    own = type("Own", (Sft,), {})
    stage("polish")(own)
    stage("polish")(own)  # its module was imported again
    assert list(all_stages())[-1] == "polish" and stage_named("polish").trains_on_conversations
    with pytest.raises(
        UserError, match=r"stage 'base': there are two of that name, nanochat_pl\.training\.stages\.base"
    ):
        stage("base")(type("Other", (Stage,), {}))
    with pytest.raises(UserError, match="name='domain': must be one of tokenizer, base, mid, sft"):
        StageSettings(name="domain")


def test_other_packages_add_stages(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known by its name, it needs no file in configs/stage: it takes that of the stage that it is like."""
    (fresh / "polish_module.py").write_text(POLISH, encoding="utf-8")
    points = [EntryPoint("polish", "polish_module", "nanochat_pl.stages")]
    monkeypatch.setattr("nanochat_pl.common.registry.entry_points", lambda group: points)
    REGISTRY.loaded = False
    config = compose_train(["stage=polish"]).config
    assert (config.stage.name, config.stage.parent, config.stage.effective_loss_mask) == ("polish", None, "assistant")
    assert config.schedule == compose_train(["stage=sft"]).config.schedule != compose_train([]).config.schedule
    assert compose_train(["stage=polish", "stage.parent=sft"]).config.stage.parent == "sft"
    assert parents_of(stage_named("mid")) == ("base", "polish")
    with pytest.raises(UserError, match=r"stage\.parent=base: the stage polish starts from sft\."):
        compose_train(["stage=polish", "stage.parent=base"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        ("Here is no Python.", "SyntaxError"),
        ("raise RuntimeError('no GPU')", "RuntimeError: no GPU"),
        ("raise SystemExit(0)", "SystemExit: 0"),
    ],
)
def test_another_package_that_cannot_be_imported(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    """Every command ended with it, as a bug of ours or as a success."""
    (fresh / "polish_module.py").write_text(text, encoding="utf-8")
    points = [EntryPoint("polish", "polish_module", "nanochat_pl.stages")]
    monkeypatch.setattr("nanochat_pl.common.registry.entry_points", lambda group: points)
    REGISTRY.loaded = False
    with pytest.raises(UserError, match=rf"entry point polish = polish_module: cannot be imported.*uninstall.*{said}"):
        all_stages()
