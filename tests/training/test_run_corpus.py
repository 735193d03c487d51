"""A run keeps the corpus of docstrings that it was begun with, whatever is installed meanwhile."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.cli.evaluate_settings import EvaluateConfig
from nanochat_pl.cli.evaluate_suites import Trained, open_jobs
from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.paths import PathsSettings
from nanochat_pl.common.schema import to_plain
from nanochat_pl.data.sources import python_docs
from nanochat_pl.data.sources.base import DataSettings
from nanochat_pl.data.sources.docstrings import Package
from nanochat_pl.data.sources.python_docs import open_python_docs
from nanochat_pl.data.sources.run_corpus import ChosenCorpus, RunCorpus, corpus_of_bundle
from tests.training.conftest import SENTENCE, same_weights, tiny_overrides, weights_of


@dataclass
class Site:
    """A folder with packages, which stand for what is installed."""

    place: Path
    packages: list[Package] = field(default_factory=list)

    def install(self, name: str, version: str) -> None:
        root, chance = self.place / f"{name}-{version}", random.Random(f"{name} {version}")
        root.mkdir()
        texts = (" ".join(chance.choices(SENTENCE.split(), k=30)) for _ in range(60))
        functions = (f'def f{n}(a):\n    """{text}"""\n' for n, text in enumerate(texts))
        (root / "__init__.py").write_text("".join(functions), encoding="utf-8")
        self.packages = [package for package in self.packages if package.name != name]
        self.packages.append(Package(name, version, root))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """What is installed: alpha to train on, rich to validate on."""
    (tmp_path / "site").mkdir()
    site = Site(tmp_path / "site")
    site.install("alpha", "1.0")
    site.install("rich", "1.0")
    monkeypatch.setattr(python_docs, "installed_packages", lambda: (site.packages, []))
    return site


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., int]:
    kept = [text for text in tiny_overrides(tmp_path) if not text.startswith(("data", "max_steps"))]
    return lambda *more: main(["train", "run=a", "data=python_docs", "max_steps=10", *kept, *more])


def drift(site: Site) -> None:
    site.install("gamma", "2.0")
    site.install("rich", "1.1")


def killed_after_step_5(base: Path) -> None:
    """Make a finished stage one that was killed."""
    shutil.rmtree(base / "bundle")
    (base / "finished.json").unlink()
    (base / "checkpoints" / "step=000010.ckpt").unlink()


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_corpus_and_so_does_its_evaluation(
    site: Site, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cache = tmp_path / "runs" / "a", tmp_path / "cache"
    assert train() == 0
    whole, corpus = weights_of(run, "base"), open_python_docs(cache)
    assert json.loads((run / "base" / "corpus.json").read_text()) == {
        "corpus_hash": corpus.fingerprint,
        "folder": corpus.folder.name,
        "python": corpus.manifest["python"],
        "packages": {"alpha": "1.0", "rich": "1.0"},
    }
    killed_after_step_5(run / "base")
    drift(site)
    assert open_python_docs(cache).fingerprint != corpus.fingerprint
    assert train() == 0
    assert same_weights(weights_of(run, "base"), whole)
    paths = [text for text in tiny_overrides(tmp_path) if text.startswith("paths.")]
    assert main(["evaluate", "run=a", "suites=[bpb]", "num_rows=4", "accelerator=cpu", *paths]) == 0
    record = json.loads((run / "evaluation" / "base" / "tasks" / "bpb" / "bpb.json").read_text())
    assert record["problems"]["text"] == corpus.fingerprint

    # Gone from the cache: a stage that has begun does not go on with another without being told to.
    killed_after_step_5(run / "base")
    shutil.rmtree(corpus.folder)
    capsys.readouterr()
    assert train() == 2
    said = capsys.readouterr().err
    assert f"the corpus python_docs {corpus.fingerprint[:12]} is not in" in said
    assert "(came: gamma 2.0; changed: rich 1.0 → 1.1)" in said and "run=NEW" in said
    corpus_now = RunCorpus(cache, run / "base" / "corpus.json", begun=True, may_change=True).reopened()
    assert "came: gamma 2.0" in capsys.readouterr().out
    assert json.loads((run / "base" / "corpus.json").read_text())["corpus_hash"] == corpus_now.fingerprint


def test_a_tokenizer_is_compared_on_the_corpus_of_its_run(site: Site, tmp_path: Path) -> None:
    """It was compared on the text of the packages that were installed by then."""
    corpus = RunCorpus(tmp_path / "cache")
    corpus.reopened()
    settings = {"data": to_plain(DataSettings(name="python_docs"))}
    trained = Trained(tmp_path / "bundle", StageInfo(stage="base", settings=settings, data=corpus.chosen()))
    config = EvaluateConfig(suites=["tokenizer"], paths=PathsSettings(cache=str(tmp_path / "cache")))
    before = open_jobs(trained, config)[0][0].problems
    drift(site)
    assert open_jobs(trained, config)[0][0].problems == before


def test_a_later_stage_has_the_corpus_of_the_one_before(site: Site, tmp_path: Path) -> None:
    begun = RunCorpus(tmp_path / "cache", tmp_path / "corpus.json")
    assert begun.chosen() == {} and begun.kept is None
    first = begun.reopened()
    record = json.loads(json.dumps(begun.chosen()))
    drift(site)
    inherited = corpus_of_bundle(record, "stage.json")
    later = RunCorpus(tmp_path / "cache", tmp_path / "later.json", inherited=inherited)
    assert later.chosen() == record, "also of a stage that reads nothing of it"
    assert later.reopened().folder == first.folder
    assert (tmp_path / "later.json").read_text() == (tmp_path / "corpus.json").read_text()
    # A bundle that is older than the record says its hash as that of its data.
    older = corpus_of_bundle({"source": "python_docs", "fingerprint": first.fingerprint}, "stage.json")
    assert RunCorpus(tmp_path / "cache", inherited=older).reopened().folder == first.folder
    assert corpus_of_bundle({"source": "climbmix", "fingerprint": "1"}, "stage.json") is None
    for wrong in (7, {}, {"corpus_hash": "1" * 65}, {"corpus_hash": "1", "path": "/etc"}):
        with pytest.raises(UserError, match=r"data\.corpus"):
            corpus_of_bundle({"corpus": wrong}, "stage.json")


def test_where_the_inherited_corpus_is_gone_the_installed_one_is_taken_with_a_word(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = ChosenCorpus.of(open_python_docs(tmp_path / "cache"))
    assert RunCorpus(tmp_path / "elsewhere", inherited=before).reopened().fingerprint == before.corpus_hash
    assert "instead" not in capsys.readouterr().out, "built anew, it is the same"
    site.packages = [package for package in site.packages if package.name != "alpha"]
    site.install("beta", "3.0")
    other = RunCorpus(tmp_path / "new", inherited=before).reopened()
    assert other.fingerprint != before.corpus_hash
    assert "(came: beta 3.0; went: alpha 1.0). It is taken instead." in capsys.readouterr().out


def test_a_damaged_record_is_named_and_a_damaged_neighbour_passed_over(site: Site, tmp_path: Path) -> None:
    record, cache = tmp_path / "corpus.json", tmp_path / "cache"
    corpus = RunCorpus(cache, record).reopened()
    for content in ("{", "[]", "{}"):
        neighbour = cache / "python_docs" / f"0{len(content)}"
        neighbour.mkdir(exist_ok=True)
        (neighbour / "manifest.json").write_text(content)
    elsewhere: dict[str, Any] = {**to_plain(ChosenCorpus.of(corpus)), "folder": "../../x"}
    record.write_text(json.dumps(elsewhere))
    assert RunCorpus(cache, record, begun=True).reopened().folder == corpus.folder
    record.write_text('{"corpus_hash": 7}')
    with pytest.raises(UserError, match=r"corpus\.json"):
        RunCorpus(cache, record, begun=True).reopened()
