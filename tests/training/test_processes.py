"""One training on several processes: the rows, the metrics and the files of the same command on one."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.cli.train import compose_train, place_of, require_same_settings_everywhere
from nanochat_pl.common.errors import SharedError
from nanochat_pl.common.paths import cache_folder
from nanochat_pl.data.sources.run_corpus import RunCorpus
from nanochat_pl.distributed import collectives, coordination
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.training.checkpoint.resume import resume_files
from nanochat_pl.training.device import prepare_machine
from nanochat_pl.training.stage_data.text import prepare_pretraining
from nanochat_pl.training.stages.registry import StageContext
from tests.helpers.launch import launch
from tests.helpers.processes import run
from tests.training.conftest import same_weights, sft_overrides, tiny_overrides, weights_of
from tests.training.test_mixture import mixture, write_others

# Two rows a step, one in memory at once: a sum over processes has the two terms of the sum over micro-batches.
TWO_ROWS = ("total_batch_tokens=64", "device_batch_size=1", "max_steps=12", "evaluation.every_steps=6")
EIGHT_ROWS = ("total_batch_tokens=256", "device_batch_size=2", "max_steps=24", "model.compute_dtype=float32")


def command(place: Path, name: str, *overrides: str, stage: str = "base") -> list[str]:
    settings = sft_overrides(place) if stage == "sft" else [*tiny_overrides(place), f"stage={stage}"]
    return ["train", f"run={name}", *settings, *overrides]


def new_run(place: Path, name: str, stage: str = "base") -> Path:
    """A run with what the stage builds on."""
    folder = place / "runs" / name
    for parent in ("tokenizer", "base") if stage == "sft" else ("tokenizer",):
        shutil.copytree(place / "runs" / "whole" / parent, folder / parent)
    return folder


def rewound(place: Path, name: str, to: str, step: int, stage: str = "base") -> Path:
    """A copy of a run as it was when the resume file of a step was its newest."""
    folder = place / "runs" / to
    shutil.copytree(place / "runs" / name, folder)
    for path in (folder / stage / "bundle", *(folder / stage).glob("finished.json")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    newest, *others = [path for path in resume_files(folder / stage / "checkpoints") if f"{step:06d}" in path.name]
    assert not others
    for path in set(resume_files(newest.parent)) - {newest}:
        path.unlink()
    return folder


def table(folder: Path, *names: str) -> list[list[float | None]]:
    """Columns of metrics.csv, a list for each line."""
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [[float(row[name]) if row[name] else None for name in names] for row in csv.DictReader(file)]


def metrics(folder: Path, *names: str) -> list[list[float | None]]:
    """Columns of metrics.csv, a list for each step; each step stands in it once."""
    steps = table(folder, "step")
    first = 0 if folder.name == "base" else 1  # base is measured before its first step too
    assert steps == [[n + first] for n in range(len(steps))]
    return table(folder, *names)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def trained(processes: int | list[int], arguments: list[str]) -> str:
    """Train on several processes; what was printed on stdout."""
    done = launch(processes, arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def on_one(place: Path) -> Callable[..., Path]:
    """The folder of a run on one process, in this one; trained once for each set of settings."""

    def train(name: str, *overrides: str, stage: str = "base") -> Path:
        if not (folder := place / "runs" / name).exists():
            new_run(place, name, stage)
            assert main(command(place, name, *overrides, stage=stage)) == 0
        return folder

    return train


@pytest.mark.parametrize("stage", [pytest.param("base", marks=pytest.mark.slow), "sft"])
def test_two_processes_end_with_the_bits_of_one(place: Path, on_one: Callable[..., Path], stage: str) -> None:
    """Also where gradients are scaled down to a norm, which has the bits of one process too."""
    settings = (*TWO_ROWS, "trainer.checkpoint_every_steps=6", "optim.max_grad_norm=0.5")
    one, two = on_one(f"clipped-{stage}", *settings, stage=stage), new_run(place, f"two-{stage}", stage)
    printed = trained(2, command(place, two.name, *settings, stage=stage))
    columns = ("train/loss", "train/gradient_norm", "train/tokens", "train/lr_multiplier", "val/bpb", "val/bpb_stderr")
    for ours, theirs in zip(metrics(one / stage, *columns), metrics(two / stage, *columns), strict=True):
        assert ours[:4] == theirs[:4]
        assert theirs[4:] == pytest.approx(ours[4:], abs=1e-6)
    norms = [norm for (norm,) in metrics(two / stage, "train/gradient_norm") if norm is not None]
    assert max(norms) > 0.5, "some were scaled down"
    assert same_weights(weights_of(one, stage), weights_of(two, stage))
    assert files(two / stage) == files(one / stage)
    assert (two / stage / "samples.jsonl").read_text() == (one / stage / "samples.jsonl").read_text()
    lines = [line for line in printed.splitlines() if line]
    assert len(lines) == len(set(lines)) and f"{two.name}/{stage}: validation" in printed, printed
    assert json.loads((two / stage / "plan.json").read_text())["num_devices"]["value"] == 2
    waited = metrics(two / stage, "train/communication_seconds", "train/step_seconds")[int(stage == "base") :]
    assert all(0 < seconds < of_step for seconds, of_step in waited)


@pytest.mark.slow
def test_two_processes_with_sharded_weights_end_with_those_of_one(place: Path, on_one: Callable[..., Path]) -> None:
    settings = (*TWO_ROWS, "trainer.checkpoint_every_steps=6")
    one, two = on_one("one-base", *settings), new_run(place, "two-sharded")
    printed = trained(2, command(place, two.name, *settings, "trainer.strategy=fsdp"))
    assert f"{two.name}/base: validation" in printed, printed
    columns = ("train/loss", "train/gradient_norm", "val/bpb")
    for ours, theirs in zip(metrics(one / "base", *columns), metrics(two / "base", *columns), strict=True):
        assert [each or 0.0 for each in theirs] == pytest.approx([each or 0.0 for each in ours], rel=1e-5)
    assert files(two / "base") == files(one / "base")
    for name, weight in weights_of(one, "base").items():
        assert weights_of(two, "base")[name].float().numpy() == pytest.approx(weight.float().numpy(), abs=1e-4), name


@pytest.mark.slow
def test_a_file_of_one_process_is_gone_on_with_on_two_and_back(
    place: Path, on_one: Callable[..., Path], train: Callable[..., int]
) -> None:
    settings = (*TWO_ROWS, "trainer.checkpoint_every_steps=4", "trainer.keep_last=4")
    whole = on_one("whole-12", *settings)
    two = rewound(place, whole.name, "one-then-two", step=4)
    printed = trained(2, command(place, two.name, *settings))
    assert "going on after step 4" in printed and "processes was 1 and is 2 now" in printed, printed
    assert same_weights(weights_of(whole, "base"), weights_of(two, "base"))
    assert metrics(two / "base", "train/loss") == metrics(whole / "base", "train/loss")
    back = rewound(place, two.name, "two-then-one", step=8)
    assert train(f"run={back.name}", *settings) == 0
    assert same_weights(weights_of(whole, "base"), weights_of(back, "base"))


def test_a_wrong_setting_is_said_once(place: Path) -> None:
    done = launch(2, command(place, "wrong", "data.path=/nowhere/at/all"))
    assert done.returncode != 0 and done.stdout.count("error") == 0
    assert done.stderr.count("error: ") == done.stderr.count("error: data.path='/nowhere/at/all'") == 1, done.stderr
    assert "exitcode  : 2" in done.stderr and "Traceback" not in done.stderr.partition("torch/distributed")[0]
    assert not (place / "runs" / "wrong").exists()


def differing_commands(place: str, depths: list[int]) -> str:
    composed = compose_train(command(Path(place), "any", f"model.depth={depths[collectives.rank()]}")[1:])
    try:
        require_same_settings_everywhere(composed)
    except SharedError as error:
        return error.problems[0]
    return ""


def test_processes_that_were_started_with_different_settings_are_refused(place: Path) -> None:
    assert run(2, differing_commands, str(place), [3, 3]) == ["", ""]
    said = run(2, differing_commands, str(place), [3, 4])
    assert said[0] == said[1] and said[0].startswith("process 1: ")
    assert "model.depth=4" in said[0] and "model.depth=3" in said[0]


def validated(place: str, num_rows: int) -> dict[str, float]:
    composed = compose_train(command(Path(place), "whole", f"evaluation.num_rows={num_rows}")[1:])
    config, cache = composed.config, cache_folder(composed.config.paths)
    machine = prepare_machine(config)
    context = StageContext(config, place_of(composed), cache, machine, RunCorpus(cache))
    prepared = coordination.rank_zero_first(lambda: prepare_pretraining(context))
    net = init_weights(GPT(prepared.model).materialise(), seed=1)
    pauses = 0

    def between() -> None:
        nonlocal pauses
        pauses += 1

    metrics = prepared.validation.measure(net, between)
    return {**metrics, "pauses": float(pauses)}


@pytest.mark.parametrize("num_rows", [1, 2, 23])
def test_validation_does_not_depend_on_the_number_of_processes(place: Path, num_rows: int) -> None:
    one = run(1, validated, str(place), num_rows)[0]
    for processes in (2, 3):
        of_all = run(processes, validated, str(place), num_rows)
        assert of_all == [of_all[0]] * processes
        most = -(-num_rows // processes)  # rows of the largest share; at most as many are in memory at once
        assert of_all[0].pop("pauses") == -(-most // min(4, -(-8 // processes)))
        assert of_all[0] == pytest.approx({key: one[key] for key in one if key != "pauses"}, abs=1e-6)


@pytest.mark.slow
def test_other_numbers_of_processes_go_on_with_a_file_of_two(place: Path, train: Callable[..., int]) -> None:
    """Sums of several terms are added up in another order: the losses of twenty steps differ by less than 1e-5."""
    settings = (*EIGHT_ROWS, "trainer.checkpoint_every_steps=4", "trainer.keep_last=20")
    whole = new_run(place, "two-24")
    trained(2, command(place, whole.name, *settings))
    expected = metrics(whole / "base", "train/loss", "train/tokens")[1:]  # the first weights are only validated

    def check(folder: Path) -> None:
        found = metrics(folder / "base", "train/loss", "train/tokens")[1:]
        assert len(found) == 24
        for (loss, tokens), (expected_loss, expected_tokens) in zip(found, expected, strict=True):
            assert loss == pytest.approx(expected_loss, abs=1e-5) and tokens == expected_tokens

    on_one = rewound(place, whole.name, "two-then-1", step=4)
    assert train(f"run={on_one.name}", *settings) == 0
    check(on_one)
    for processes in (3, 4):
        folder = rewound(place, whole.name, f"two-then-{processes}", step=4)
        trained(processes, command(place, folder.name, *settings))
        check(folder)
        back = rewound(place, folder.name, f"{processes}-then-two", step=12)
        trained(2, command(place, back.name, *settings))
        check(back)


@pytest.mark.slow
def test_two_nodes_train_and_go_on(place: Path, on_one: Callable[..., Path]) -> None:
    """Two agents of torchrun; one node has a process more than the other, and the step fewer rows than processes."""
    settings = (*TWO_ROWS, "trainer.checkpoint_every_steps=4", "trainer.keep_last=4")
    whole = on_one("whole-12-rows", *settings)
    nodes = new_run(place, "nodes")
    printed = trained([1, 2], command(place, nodes.name, *settings))
    assert printed.count("Final validation") == 1
    expected = metrics(whole / "base", "train/loss")
    assert metrics(nodes / "base", "train/loss") == expected  # the third process has no rows: x + 0 is x
    assert same_weights(weights_of(whole, "base"), weights_of(nodes, "base"))
    resuming = rewound(place, nodes.name, "nodes-go-on", step=4)
    trained([2, 1], command(place, resuming.name, *settings))
    assert metrics(resuming / "base", "train/loss") == expected


@pytest.mark.slow
def test_text_that_is_tokenized_ahead_is_so_by_one_process(
    place: Path, tmp_path: Path, on_one: Callable[..., Path]
) -> None:
    settings = [*TWO_ROWS, "data.shuffle=shards"]
    one, two = on_one("one-streamed", *settings), new_run(place, "two-streamed")
    trained(2, command(place, two.name, *settings, f"paths.cache={tmp_path}", "trainer.num_workers=1"))
    assert metrics(two / "base", "train/loss") == metrics(one / "base", "train/loss")
    assert same_weights(weights_of(one, "base"), weights_of(two, "base"))
    assert len(list((tmp_path / "ahead").glob("*.json"))) == 1


@pytest.mark.slow
def test_figures_of_the_sources_of_a_mixture_are_those_of_all_processes(place: Path, tmp_path: Path) -> None:
    """Also where a resume file lies between two lines of metrics."""
    logged = ("trainer.log_every_steps=3", "trainer.checkpoint_every_steps=4", "trainer.keep_last=4")
    settings = [*mixture(place, write_others(tmp_path / "others")), *TWO_ROWS, *logged]
    assert main(["train", "run=one-mixture", *settings]) == 0
    one, two = place / "runs" / "one-mixture", place / "runs" / "two-mixture"
    shutil.copytree(one / "tokenizer", two / "tokenizer")
    trained(2, ["train", "run=two-mixture", *settings])
    resuming = rewound(place, "two-mixture", "two-mixture-goes-on", step=4)
    trained(2, ["train", "run=two-mixture-goes-on", *settings])
    names = ("train/loss", "train/loss_cats", "train/loss_numbers", "train/tokens_cats", "val/bpb", "val/bpb_numbers")
    expected = table(one / "base", "step", *names)
    assert [row[0] for row in expected] == [0, 3, 6, 9, 12] and None not in [row[2] for row in expected[1:]]
    for folder in (two, resuming):
        for found, row in zip(table(folder / "base", "step", *names), expected, strict=True):
            assert found == pytest.approx(row, abs=1e-6)


@pytest.mark.slow
def test_a_tokenizer_is_trained_once_and_a_finished_stage_is_left_alone(place: Path) -> None:
    arguments = [*command(place, "only-tokenizer", stage="tokenizer"), "tokenizer.max_chars=1000000"]
    assert trained(2, arguments).count("Training a tokenizer") == 1
    bundle = place / "runs" / "only-tokenizer" / "tokenizer" / "bundle"
    before = {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()}
    assert "is finished. resume=never trains a new one." in trained(2, arguments)
    assert {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()} == before
    assert trained(2, [*arguments, "resume=never"]).count("New run: only-tokenizer-2") == 1
