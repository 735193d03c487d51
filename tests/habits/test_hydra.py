"""What users of Hydra have in their fingers, each as they type it."""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from nanochat_pl.cli import _sweep
from nanochat_pl.cli.main import main
from nanochat_pl.cli.pipeline import steps_of
from nanochat_pl.cli.train import compose_train, place_of
from nanochat_pl.common.errors import UserError
from nanochat_pl.config import config_dir, hydra_app
from tests.helpers.forked import run_forked
from tests.helpers.sweeps import jobs_of
from tests.training.conftest import tiny_overrides, write_texts

TRAIN_PY = Path(__file__).parents[2] / "train.py"
FEW_STEPS = ("max_steps=4", "schedule.warmup_steps=1", "evaluation.every_steps=0", "trainer.checkpoint_every_steps=2")


def few_steps(place: Path) -> list[str]:
    changed = {text.partition("=")[0] for text in FEW_STEPS} | {"model.depth"}
    kept = [text for text in tiny_overrides(place) if text.partition("=")[0] not in changed]
    return [*kept, *FEW_STEPS, f"paths.runs={place / 'runs'}"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["train", *arguments]) == 0
    return capsys.readouterr().out


def test_train_py_prints_its_configuration() -> None:
    done = run_forked([str(TRAIN_PY), "--cfg", "job", "stage=base"])
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    assert shown["stage"]["name"] == "base" and shown["trainer"]["keep_last"] == 2 and shown["optim"]["muon"]
    assert done.stderr == ""


def test_parts_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    job = yaml.safe_load(printed(capsys, "--cfg", "job", "--resolve"))
    muon = yaml.safe_load(printed(capsys, "-c", "job", "--package", "optim.muon"))
    assert muon == job["optim"]["muon"]
    hydra = yaml.safe_load(printed(capsys, "--cfg", "hydra", "experiment=demo"))
    assert hydra["hydra"]["runtime"]["choices"]["model"] == "tiny"
    both = yaml.safe_load(printed(capsys, "--cfg", "all", "model.depth=3"))
    assert both["model"]["depth"] == 3 and both["hydra"]["launcher"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--info", "defaults", "experiment=demo"), "| model/tiny "),
        (("--info", "searchpath"), "| main "),
        (("--info", "config"), "warmdown_ratio: 0.65"),
        (("--hydra-help",), "--multirun,-m"),
        (("-sc", "install=bash"), "hydra_bash_completion"),
    ],
)
def test_what_hydra_tells_of_itself(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in printed(capsys, *arguments)


def test_a_folder_of_ones_own_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = here / "mine"
    (own / "optim").mkdir(parents=True)
    (own / "experiment").mkdir()
    (own / "optim" / "slow.yaml").write_text("# Slow.\nmatrix_lr: 0.001\n", encoding="utf-8")
    overlay = "# @package _global_\ndefaults:\n  - override /optim: slow\n  - _self_\nmodel: {depth: 3}\nseed: 7\n"
    (own / "experiment" / "small.yaml").write_text(overlay, encoding="utf-8")
    root = "defaults: [train, _self_]\nmax_steps: 11\n"
    (own / "short.yaml").write_text(root, encoding="utf-8")
    for flags in (["--config-dir", "mine"], ["-cd", str(own)], ["--config-dir=mine"]):
        shown = yaml.safe_load(printed(capsys, *flags, "-c", "job", "experiment=small", "seed=8"))
        assert (shown["optim"]["matrix_lr"], shown["model"]["depth"], shown["seed"]) == (0.001, 3, 8)
    shown = yaml.safe_load(printed(capsys, "--config-dir", "mine", "-cn", "short", "--cfg", "job", "optim=slow"))
    assert (shown["max_steps"], shown["optim"]["matrix_lr"]) == (11, 0.001)
    assert "| experiment/small " in printed(capsys, "--config-dir", "mine", "--info", "defaults", "experiment=small")
    assert main(["train", "--config-dir", "mine", "check_only=true", "optim=slwo", "max_steps=1"]) == 2
    assert "optim=slwo: there is no such choice; did you mean slow?" in capsys.readouterr().err
    (own / "optim" / "sub").mkdir()
    (own / "optim" / "sub" / "deep.yaml").write_text("matrix_lr: 0.002\n", encoding="utf-8")
    shown = yaml.safe_load(printed(capsys, "--config-dir", "mine", "--cfg", "job", "optim=sub/deep"))
    assert shown["optim"]["matrix_lr"] == 0.002
    for wrong, said in (
        (["--config-dir", "nowhere"], "--config-dir nowhere: is not a folder"),
        (["--config-name", "shrot", "--config-dir", "mine"], "there is no such file; did you mean short?"),
        (["--config-path", "mine"], "--config-path: is not supported."),
        (["--config-dir"], "--config-dir: expected one argument"),
    ):
        assert main(["train", "--cfg", "job", *wrong]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(Exception, match="optim=slow: there is no such choice"):
        compose_train(["optim=slow"])


def test_what_is_deleted_is_as_if_it_had_not_been_set(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watched = ("callbacks=[learning_rate,model_summary]", "~callbacks.learning_rate")
    assert list(compose_train([*watched]).config.callbacks) == ["model_summary"]
    assert compose_train(["~logger"]).config.logger == {}
    assert compose_train(["experiment=tiny", "~max_steps"]).config.max_steps is None
    assert main(["train", "~callbacks.nothing"]) == 2
    assert "~callbacks.nothing: there is nothing of that name to delete." in capsys.readouterr().err


def test_hydras_own_keys_do_what_they_do_elsewhere(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(here / "texts")
    keys = ["hydra.run.dir=out/${model.depth}", "hydra.output_subdir=.hydra", "+hydra.job.env_set.MINE=1"]
    assert main(["train", "run=one", *keys, "model.depth=1", *few_steps(here)]) == 0
    assert (here / "runs" / "one" / "base" / "finished.json").is_file()
    assert not logging.getLogger("nanochat_pl.data").disabled, "Hydra's `disabled` logging switches off every logger"
    kept = yaml.safe_load((here / "out" / "1" / ".hydra" / "config.yaml").read_text(encoding="utf-8"))
    assert kept["model"]["depth"] == 1
    capsys.readouterr()
    assert main(["train", "hydra.run.dri=x"]) == 2
    assert "Could not override 'hydra.run.dri'" in capsys.readouterr().err
    assert main(["train", "hydra.run.dir=x", "model.dpeth=1"]) == 2
    assert "model.dpeth: there is no such key; did you mean model.depth?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_with_another_launcher(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    write_texts(here / "texts")
    sweep = ["train", "-m", "hydra/launcher=joblib", "model.depth=1", "seed=0,1", *few_steps(here)]
    assert main(sweep) == 0
    rows = [line.split()[:3] for line in capfd.readouterr().out.splitlines()[-2:]]
    names = ["d1-seed0", "d1-seed1"]
    assert rows == [[name, "base", "finished"] for name in names]
    assert {place_of(compose_train([f"run={name}"])).status for name in names} == {"finished"}
    assert main(sweep) == 0
    again = [line.split()[:4] for line in capfd.readouterr().out.splitlines()[-2:]]
    assert again == [[name, "base", "finished", "before"] for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_jobs_of_a_launcher_end_with_the_sweep(here: Path, number: signal.Signals) -> None:
    """They trained on, without anybody who could stop them."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    write_texts(here / "texts")
    endless = [
        "train",
        "-m",
        "hydra/launcher=joblib",
        "seed=0,1",
        "model.depth=1",
        *few_steps(here),
        "max_steps=20000",
    ]
    command = [sys.executable, "-m", "nanochat_pl.cli.main", *endless]
    with (here / "log.txt").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as sweep:
        wait_until(lambda: len([*here.glob("runs/*/base/checkpoints/*.ckpt")]) > 0)
        assert len(children_of(here)) > 1
        sweep.send_signal(number)
        wait_until(lambda: not children_of(here))


def children_of(place: Path) -> list[int]:
    """The processes that name the place in their command line."""
    commands = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            commands[int(path.parent.name)] = path.read_bytes()
    return [pid for pid, words in commands.items() if str(place).encode() in words]


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_launcher_or_sweeper_that_is_not_installed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-m", "hydra/launcher=slrm", "seed=1,2"]) == 2
    assert "Could not find 'hydra/launcher/slrm'" in capsys.readouterr().err
    assert main(["evaluate", "-m", "limit=1,2"]) == 2
    assert "-m: several jobs are for train and pipeline, not for evaluate." in capsys.readouterr().err


def test_own_files_are_forgotten_with_their_command(here: Path) -> None:
    (here / "mine" / "optim").mkdir(parents=True)
    (here / "mine" / "optim" / "slow.yaml").write_text("# Slow.\nmatrix_lr: 0.001\n", encoding="utf-8")
    with config_dir.chosen("mine", None):
        assert "slow" in config_dir.groups()["optim"]
    assert "slow" not in config_dir.groups()["optim"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-m", "seed=1,2", "--info", "config"), "--info and --multirun: only one of them at a time."),
        (("-m", "seed=1,2", "--cfg", "job"), "--cfg and --multirun: only one of them at a time."),
        (("--resolve",), "--resolve: says how --cfg prints"),
        (("hydra=3",), "hydra: there is no such key"),
        (("-m", "seed=range(3,0)"), "-m: gives no jobs."),
        (("-m", "optim=glob(zz*)"), "-m: gives no jobs."),
        (("-m", "seed=range(0,nan)"), "Hydra: "),
        (("-m", "seed=range(0,1e12)"), "-m: seed=range(0,1e12): makes more than 1,000 jobs."),
        (("-m", "data.path=/tmp/é,/tmp/z", "seed=1,2"), "Put quotes around a value with special characters"),
        (("-m", "seed=1,2", "hydra.sweeper.max_batch_size=0"), "Hydra: "),
        (("-m", "seed=1,2", "hydra.launcher._target_=nope.X"), "Hydra: "),
        (("-m", "seed=1,2", "hydra.sweep.dir=/proc/x"), "Hydra: "),
        (("hydra.run.dir=/proc/x", "check_only=true"), "Hydra: "),
        (("+hydra.callbacks.x._target_=nope.Nope", "check_only=true"), "Hydra: "),
        (("paths.cache=c", "--foo"), "--foo: options are written key=value, without dashes"),
        (("-sc", "query=bash"), "Hydra: "),
    ],
)
def test_what_is_wrong_with_hydras_own(
    here: Path, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "model.depth=1", "max_steps=1", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert not [path for path in here.rglob("*") if path.name not in ("runs", "multirun.yaml")]


def test_nothing_is_made_for_a_command_that_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "hydra.run.dir=out", "model.dpeth=1"]) == 2
    assert main(["runs", "hydra.verbose=true"]) == 2
    assert "is for" in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_another_root_file_is_for_the_plan_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "short.yaml").write_text("defaults: [train, _self_]\nmax_steps: 11\n", encoding="utf-8")
    for command in ("train", "plan", "doctor"):
        assert main([command, "--config-dir", ".", "--config-name", "short", "--cfg", "job"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["max_steps"] == 11
    assert main(["evaluate", "--config-dir", ".", "--config-name", "short", "--cfg", "job"]) == 0
    assert main(["evaluate", "--config-dir", ".", "--config-name", "short"]) == 2
    assert "--config-name: is for train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a: [", "mine/optim/x.yaml: is no YAML"),
        (b"\xff\xfe\x00", "mine/optim/x.yaml"),
        (b"matrix_lr: 1\nmatrix_lr: 2\n", "mine/optim/x.yaml: matrix_lr stands in line 1 and again in line 2"),
        (b"- a\n", "mine/optim/x.yaml: must be a group of settings"),
        (b"1: 2\n", "mine/optim/x.yaml: must be a group of settings"),
        (b"defaults: 3\n", "cannot be composed"),
        (b"defaults: [x]\n", "cannot be composed"),
        (b"matrix_lr: ${nope:1}\n", "optim.matrix_lr"),
        (b"matrix_lr: ${optim.matrix_lr}\n", "optim.matrix_lr"),
        (
            b"a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + b"".join(b"%c: &%c [%s]\n" % (97 + n, 97 + n, b", ".join([b"*%c" % (96 + n)] * 9)) for n in range(1, 9)),
            "mine/optim/x.yaml",
        ),
    ],
)
def test_odd_files_of_ones_own_are_named(
    here: Path, text: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "mine" / "optim").mkdir(parents=True)
    (here / "mine" / "optim" / "x.yaml").write_bytes(text)
    (here / "mine" / "optim" / "folder.yaml").mkdir()
    (here / "mine" / "optim" / "dangling.yaml").symlink_to("nowhere")
    assert main(["train", "--config-dir", "mine", "optim=x", "check_only=true", "model.depth=1"]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    for name in ("folder", "dangling"):
        assert main(["train", "--config-dir", "mine", f"optim={name}"]) == 2
        assert f"optim={name}: there is no such choice" in capsys.readouterr().err


def test_text_beside_hydras_keys_is_as_it_was_typed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "my texts (1)").mkdir()
    (here / "my texts (1)" / "a,b.txt").write_text("one two three. " * 2000, encoding="utf-8")
    text = ["data=local", "data.path=my texts (1)/a,b.txt", "tokenizer.vocab_size=265", "model.sequence_len=32"]
    assert main(["train", "hydra.run.dir=o", "check_only=true", "max_steps=1", "model.depth=1", *text]) == 0
    with pytest.raises(UserError, match=r"data.path=my texts \(1\)/a,b.txt: cannot be read, in a sweep"):
        jobs_of([*text, "seed=1,2"])
    jobs = jobs_of(["data=local", "data.path='my texts (1)/a,b.txt'", "run=1e3", "seed=1,2"])
    assert compose_train(jobs[0].overrides).config.data.path == "my texts (1)/a,b.txt"
    assert jobs[0].name == "1e3-seed1"


def test_experiments_by_path_in_a_sweep(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "deep").mkdir()
    (here / "deep" / "first.yaml").write_text("model: {depth: 3}\nmax_steps: 5\n", encoding="utf-8")
    (here / "second.yaml").write_text("defaults: [deep/first.yaml]\nmax_steps: 6\n", encoding="utf-8")
    (here / "broken.yaml").write_text("a: [", encoding="utf-8")
    jobs = jobs_of(["experiment=deep/first.yaml,second.yaml", "seed=1"])
    assert [job.name for job in jobs] == ["first", "second"]
    configs = [compose_train(job.overrides).config for job in jobs]
    assert [(config.model.depth, config.max_steps) for config in configs] == [(3, 5), (3, 6)]
    assert "depth: 3" in printed(capsys, "--info", "config", "experiment=second.yaml")


def test_a_file_that_is_made_of_another_is_what_it_is_made_of(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys that come by `defaults` count as given, and a stage's file of another name has the stage's section."""
    for group, name, text in (
        ("model", "narrow", "aspect_ratio: 48\n"),
        ("model", "mine", "defaults: [narrow, _self_]\n"),
        ("stage", "mysft", "defaults: [sft, _self_]\nnum_epochs: 2\n"),
    ):
        (here / "mine" / group).mkdir(parents=True, exist_ok=True)
        (here / "mine" / group / f"{name}.yaml").write_text(text, encoding="utf-8")
    with config_dir.chosen("mine", None):
        for file in ("narrow", "mine"):
            assert "model.aspect_ratio" in compose_train([f"model={file}"]).given
    own = ["--config-dir", "mine", "--cfg", "job", "experiment=demo"]
    usual, named = (yaml.safe_load(printed(capsys, *own, f"stage={name}")) for name in ("sft", "mysft"))
    assert named["max_steps"] == usual["max_steps"] is not None and named["mixture"] == usual["mixture"]
    assert (named["stage"]["name"], named["stage"]["num_epochs"]) == ("sft", 2)


def test_two_experiments_of_one_name_are_not_mixed_up(here: Path) -> None:
    for folder in ("x", "y"):
        (here / folder).mkdir()
        (here / folder / "exp.yaml").write_text("max_steps: 5\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"two of these files have the same name"):
        jobs_of(["experiment=x/exp.yaml,y/exp.yaml"])


def test_an_experiment_of_ones_own_that_includes_another(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra read the file itself, for which our experiments are no group."""
    (here / "mine" / "experiment").mkdir(parents=True)
    overlay = "# @package _global_\ndefaults:\n  - tiny\n  - override /optim: classic_muon\n  - _self_\nseed: 9\n"
    (here / "mine" / "experiment" / "wide.yaml").write_text(overlay, encoding="utf-8")
    own = ["--config-dir", "mine"]
    assert main(["train", "-m", *own, "experiment=wide", "seed=1,2", "check_only=true"]) == 0
    assert "| experiment/wide " in printed(capsys, *own, "--info", "defaults", "experiment=wide")
    assert "max_steps" in printed(capsys, *own, "--cfg", "job", "experiment=wide")
    assert "run:" in printed(capsys, *own, "--cfg", "hydra", "experiment=wide")


def test_a_mistake_of_ours_in_a_job_is_not_called_hydras(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sweep, "run_child", lambda *given: {}["ours"])
    with pytest.raises(KeyError, match="ours"):
        _sweep.run_sweep("train", hydra_app.parse(["-m", "seed=1,2", "model.depth=1"]))


def test_deleted_keys_of_sweeps_and_of_steps(here: Path) -> None:
    jobs = jobs_of(["experiment=tiny", "seed=1,2", "~max_steps", "~logger"])
    composed = compose_train(jobs[0].overrides).config
    assert composed.max_steps is None and composed.logger == {}
    steps = steps_of(["experiment=demo", "~stages.sft.max_steps"])
    config = next(step.compose().config for step in steps if step.name == "sft")
    assert config.max_steps is None and config.mixture.joined.share == 0.5
