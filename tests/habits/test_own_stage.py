"""A source and a stage of one's own, one file each: those of docs/data.md and docs/stages.md, as they are printed."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nanochat_pl import load_bundle
from nanochat_pl.cli.main import main
from nanochat_pl.cli.train import compose_train
from nanochat_pl.training.stages import registry
from tests.helpers.docs_checks import read_page
from tests.helpers.sweeps import jobs_of
from tests.training.conftest import same_weights, sft_overrides, tiny_overrides, weights_of

DOCS = Path(__file__).resolve().parents[2] / "docs"
SHORT = ("max_steps=6", "evaluation.every_steps=0", "evaluation.at_start=false", "trainer.checkpoint_every_steps=2")


def block_with(page: str, language: str, words: str) -> str:
    """The one block of a page in which these words stand."""
    (text,) = (
        block.text for block in read_page(DOCS / page).blocks if block.language == language and words in block.text
    )
    return text


def command(page: str, words: str) -> list[str]:
    """The command of a page in which these words stand, as words behind nanochat-pl."""
    (line,) = (
        line
        for block in read_page(DOCS / page).blocks
        for line in block.text.splitlines()
        if line.startswith("nanochat-pl") and words in line
    )
    return shlex.split(line)[1:]


def tiny(*left_out: str) -> list[str]:
    """Settings of a tiny stage, without what it has from elsewhere."""
    return [text for text in (*tiny_overrides(Path()), *SHORT) if not text.startswith(left_out)]


def of_text(*more: str) -> list[str]:
    """The page's command of its stage with tiny settings."""
    typed = command("stages.md", "train stage=domain.Domain")
    return [*typed, *tiny("data", "model.", "tokenizer.", "max_steps=40"), "schedule.warmup_steps=2", *more]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder: with both files, and with a run demo, whose base was trained on the source."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(registry.REGISTRY, "entries", dict(registry.REGISTRY.load()))
        patched.setattr(registry.REGISTRY, "classes", dict(registry.REGISTRY.classes))
        for module in ("my_text", "domain"):
            patched.delitem(sys.modules, module, raising=False)
        Path("my_text.py").write_text(block_with("data.md", "python", "class Stories"), encoding="utf-8")
        Path("domain.py").write_text(block_with("stages.md", "python", "class Domain"), encoding="utf-8")
        Path("my_texts").mkdir()
        text = "\n\n".join(f"The dog number {n} came and sat on a mat." for n in range(300))
        Path("my_texts/a.txt").write_text(text, encoding="utf-8")
        typed = command("data.md", "data.target=my_text.Stories")
        assert main([*typed, "run=demo", *tiny("data"), "data.options.count=300"]) == 0
        assert main(of_text()) == 0
        yield folder
        for module in ("my_text", "domain"):
            sys.modules.pop(module, None)


def test_the_source_is_trained_on(own: Path) -> None:
    data = load_bundle(own / "runs/demo/base/bundle").stage.data
    assert data["source"] == "Stories" and data["validation_tokens"] > 0


def test_the_stage_goes_on_with_the_model_on_its_own_text(own: Path) -> None:
    stage = load_bundle(own / "runs/demo/domain/bundle").stage
    assert (stage.stage, stage.step, [parent["stage"] for parent in stage.parents]) == ("domain", 6, ["base"])
    assert stage.settings["data"]["path"] == "my_texts" and stage.data["source"] == "local"
    assert stage.plan["smear_lr"]["overridden_by"] == "inherited from base"
    assert stage.settings["stage"]["name"] == "domain" and stage.settings["stage"]["parent"] == "base"
    base = load_bundle(own / "runs/demo/base/bundle").stage
    assert stage.settings["model"] == base.settings["model"]
    assert not same_weights(weights_of(own / "runs/demo", "base"), weights_of(own / "runs/demo", "domain"))


def test_the_stage_is_resumed(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the same bits; and finished is finished, other settings are refused."""
    folder, kept = own / "runs/demo/domain", weights_of(own / "runs/demo", "domain")
    assert main(of_text()) == 0
    assert "is finished" in capsys.readouterr().out
    assert main(of_text("seed=7")) == 2
    assert "seed=7" in capsys.readouterr().err
    shutil.rmtree(folder / "bundle")
    (folder / "finished.json").unlink()
    newest = max(folder.glob("checkpoints/step=*.ckpt"))
    newest.unlink()
    assert main(of_text()) == 0
    assert "step 4" in capsys.readouterr().out
    assert same_weights(kept, weights_of(own / "runs/demo", "domain"))


def test_commands_know_the_stage_by_its_folder(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class is known to nobody here."""
    monkeypatch.setattr(registry.REGISTRY, "entries", {**registry.REGISTRY.entries})
    del registry.REGISTRY.entries["domain"]
    monkeypatch.delitem(sys.modules, "domain")
    assert main(["runs"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[1:4] for row in rows[1:]] == [
        ["tokenizer", "finished", "0"],
        ["base", "finished", "6"],
        ["domain", "finished", "6"],
    ]
    assert main([*command("stages.md", "chat run=demo stage=domain"), "max_tokens=3"]) == 0
    assert main([*command("stages.md", "evaluate run=demo stage=domain"), "paths.cache=cache", "max_tokens=2"]) == 0
    assert (own / "runs/demo/evaluation/domain/results.json").is_file()
    assert main(["evaluate", "run=demo", "stage=domain", "suites=[chat]"]) == 2
    assert "has seen no conversation" in capsys.readouterr().err
    assert main(["report", "run=demo"]) == 0
    report = (own / "runs/demo/report/report.md").read_text(encoding="utf-8")
    assert report.index("base") < report.index("domain")
    assert main(["train", *sft_overrides(Path()), "run=demo", "check_only=true"]) == 2
    error = capsys.readouterr().err
    assert "has the stage domain, which this command does not know" in error and "stage.parent=base" in error


def test_another_stage_goes_on_from_it(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = [text for text in command("stages.md", "stage.parent=domain.Domain") if text != "resume=never"]
    assert main([*typed, *sft_overrides(Path()), "max_steps=1", "check_only=true"]) == 0
    assert "come from runs/demo/domain, which is finished" in capsys.readouterr().out
    assert main(["train", "run=demo", *sft_overrides(Path()), "check_only=true"]) == 0, "known by now, it is the newest"
    assert "come from runs/demo/domain, which is finished" in capsys.readouterr().out


def test_hydra_itself_takes_its_file(own: Path) -> None:
    """Hydra's own keys, and sweeps: there a stage without a file was none. The jobs name its class again."""
    Path("again.py").write_text(
        "from nanochat_pl.training.stages.base import Base\n"
        "from nanochat_pl.training.stages.registry import stage\n"
        "@stage('again')\nclass Again(Base):\n    '''Pretraining, once more.'''\n",
        encoding="utf-8",
    )
    assert main(of_text("check_only=true", "hydra.run.dir=out")) == 0
    assert Path("out").is_dir()
    jobs = jobs_of(["stage=again.Again", "seed=1,2", *tiny("data"), "data=local", "data.path=my_texts"])
    assert [job.name for job in jobs] == ["d2-seed1", "d2-seed2"]
    assert "stage=again.Again" in jobs[1].overrides and compose_train(jobs[1].overrides).config.stage.name == "again"


def test_what_a_record_names_is_never_imported(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run folder may be from elsewhere; a class of one's own is named on the command line."""
    shutil.copytree("runs/demo", "runs/from-elsewhere")
    Path("trap.py").write_text("raise SystemExit('it was imported')", encoding="utf-8")
    path = Path("runs/from-elsewhere/domain/config.yaml")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["stage"] |= {"name": "trap.Stage", "parent": "trap.Stage"}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    for command in ("train", "doctor"):
        main([command, *of_text("run=from-elsewhere")[1:], "check_only=true"])
        assert "it was imported" not in "".join(capsys.readouterr()) and "trap" not in sys.modules
    shutil.rmtree("runs/from-elsewhere")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "stage=domain.Domian"], "error: stage='domain.Domian': there is no such class."),
        (["train", "stage=nowhere_at_all.Stage"], "error: stage='nowhere_at_all.Stage': cannot be imported"),
        (["train", "stage=my_text.Stories"], "error: stage='my_text.Stories': is no stage"),
        (["train", "stage=domian"], "error: stage=domian: there is no such choice; did you mean domain?"),
        (["train", "stage=sft", "stage.parent=domian"], "stage.parent=domian: the stage sft starts from base or mid"),
        (["train", "stage=mid", "stage.parent=domain"], "stage.parent=domain: the stage mid starts from base."),
        (["train", "stage=sft", "stage.parent=domain.Domian"], "error: stage.parent='domain.Domian': there is no such"),
        (["train", "stage=sft", "stage=domian"], "error: stage=domian: there is no such choice"),
        (["train", "stage=domain", "stage.name=bsae"], "stage.name='bsae': must be one of tokenizer, base, mid, sft"),
        (["plan", "stage=domain"], "error: stage=domain: only base is planned from its settings alone."),
        (["train", "-m", "stage=domain", "seed=1,2"], "-m: the stage domain builds on another stage of its run"),
    ],
)
def test_mistakes_are_named_with_all_others(
    arguments: list[str], said: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *(["max_stps=3"] if arguments[0] == "train" and "-m" not in arguments else [])]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert "max_stps" in error or arguments[0] == "plan" or "-m" in arguments


def test_an_experiment_has_it_among_its_steps(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(
        block_with("stages.md", "yaml", "domain.Domain") + "shared: {stage.num_epochs: 2}\n", encoding="utf-8"
    )
    assert main(["train", "experiment=mine.yaml", "stage=domain.Domain", "run=demo", "--cfg", "job"]) == 0
    shown = capsys.readouterr().out
    assert "max_steps: 500" in shown and "path: my_texts" in shown and "num_epochs: 2.0" in shown
    assert main(["pipeline", "experiment=mine.yaml", "stages.domian.seed=3"]) == 2
    assert "stages.domian: is no step of the pipeline; did you mean domain?" in capsys.readouterr().err
