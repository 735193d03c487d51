"""A mixture of sources is trained on: its rows, its metrics by source, and that a stop changes nothing."""

from __future__ import annotations

import csv
import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from nanochat_pl.cli.main import main
from nanochat_pl.cli.train import compose_train
from nanochat_pl.data.batch import StepBatch
from nanochat_pl.data.cache.tokens import build_token_cache
from nanochat_pl.data.packing.mixture import MixedRows, MixtureSchedule
from nanochat_pl.data.packing.rows import Rows, packed_rows, streamed_rows
from nanochat_pl.data.sources.base import DataSettings, Source, WeightedSource
from nanochat_pl.data.sources.open import open_source
from nanochat_pl.model.gpt import GPT
from nanochat_pl.report import write_report
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.tokenizer.comparison import KINDS
from tests.helpers.corpus import share_corpus
from tests.helpers.forked import COMMAND
from tests.helpers.small_engine import byte_tokenizer
from tests.helpers.training import ROWS_PER_STEP, SEQUENCE_LEN, fit_tiny, tiny_model
from tests.regressions.test_fit import metrics_of as metrics_in
from tests.regressions.test_fit import stop_after
from tests.training.conftest import same_weights, tiny_overrides, weights_of
from tests.training.test_feeding import STEPS, T, hashes
from tests.training.test_resume import interrupt

OTHER_WORDS = ("7", "42", "1999", "plus", "minus", "equals", "three", "hundred", "and")


def write_others(folder: Path) -> Path:
    """Documents of another small language, in two files."""
    folder.mkdir()
    chance = random.Random(1)
    for name in ("one", "two"):
        documents = [" ".join(chance.choices(OTHER_WORDS, k=chance.randint(5, 60))) + "." for _ in range(150)]
        (folder / f"{name}.txt").write_text("\n\n".join(documents), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_others(tmp_path_factory.mktemp("others") / "files")


def mixture(place: Path, others: Path) -> list[str]:
    """Three quarters of the tiny run's text; of the other language the files arrive one by one."""
    settings = [text for text in tiny_overrides(place) if not text.startswith("data")]
    sources = {"cats": (place / "texts", 0.75), "numbers": (others, 0.25)}
    for name, (path, weight) in sources.items():
        keys = {"name": "local", "path": path, "weight": weight, "txt_document_chars": 200}
        settings += [f"data.sources.{name}.{key}={value}" for key, value in keys.items()]
    return [
        "data=mixture",
        *("data.sources.web=null", "data.sources.docs=null", "data.sources.numbers.shuffle=shards"),
        *settings,
    ]


def metrics_of(run: Path) -> list[dict[str, str]]:
    with (run / "base" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        by_the_clock = ("train/tokens_per_second", "train/step_seconds", "train/seconds", "train/mfu")
        by_the_clock += ("train/peak_memory_gib",)
        return [{k: v for k, v in row.items() if k not in by_the_clock} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def trained(place: Path, others: Path) -> Path:
    assert main(["train", "run=mixed", *mixture(place, others)]) == 0
    return place / "runs" / "mixed"


def test_figures_of_each_source_are_in_the_log(trained: Path) -> None:
    first, *rows = metrics_of(trained)
    assert len(rows) == 40
    assert first["step"] == "0" and first["val/bpb_cats"] and first["val/bpb_numbers"], "measured before the first step"
    for step, row in enumerate(rows, 1):
        # 8 rows of 32 tokens a step.
        assert (row["train/tokens_cats"], row["train/tokens_numbers"]) == (f"{step * 192}", f"{step * 64}")
        epochs = [float(row[f"train/epochs_{name}"]) for name in ("cats", "numbers")]
        before = [float(rows[step - 2][f"train/epochs_{name}"]) if step > 1 else 0 for name in ("cats", "numbers")]
        assert all(now > then for now, then in zip(epochs, before, strict=True)) and not row["train/epochs"]
        loss = 0.75 * float(row["train/loss_cats"]) + 0.25 * float(row["train/loss_numbers"])
        assert loss == pytest.approx(float(row["train/loss"]), rel=1e-6)
        assert bool(row["val/bpb_cats"]) == bool(row["val/bpb_numbers"]) == (step % 20 == 0)
    last = rows[-1]
    assert float(last["train/loss_cats"]) < float(rows[0]["train/loss_cats"])
    both = sorted([float(last["val/bpb_cats"]), float(last["val/bpb_numbers"])])
    assert both[0] < float(last["val/bpb"]) < both[1]


def test_what_a_mixture_was_made_of_is_kept(trained: Path) -> None:
    data = json.loads((trained / "base" / "bundle" / "stage.json").read_text(encoding="utf-8"))["data"]
    assert data["shares"] == {"cats": 0.75, "numbers": 0.25} and data["source"] == "mixture"
    assert data["sources"]["cats"]["packing"]["placed_tokens"] > 2 * data["sources"]["numbers"]["packing"]["pieces"]
    tokenizer = json.loads((trained / "tokenizer" / "bundle" / "stage.json").read_text(encoding="utf-8"))
    assert tokenizer["metrics"]["comparison"][0]["bytes_per_token"].keys() == {
        *KINDS,
        *("training cats", "training numbers", "held-out cats", "held-out numbers"),
    }
    write_report(trained)


def test_epochs_of_each_source_are_said(place: Path, others: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Before the training, which a prompt that is too long keeps from beginning here."""
    keys = ["run=epochs", "max_steps=2000", "data.sources.numbers.shuffle=global", "data.sources.cats.weight=30"]
    code = main(["train", *mixture(place, others), *keys, f"evaluation.sample_prompts=[{'a' * 9_000}]"])
    said = " ".join(capfd.readouterr().out.split())
    assert code == 2 and "Rows: 16,000 of 32 tokens for 2,000 steps: - cats: 15,868 of them" in said
    assert "more than 4 epochs" in said.split("- cats")[1].split("- numbers")[0]
    assert "- numbers: 132 of them, 0.1" in said and "more than" not in said.split("- numbers")[1]


def test_plan_and_doctor_tell_of_each_source(
    trained: Path, place: Path, others: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = mixture(place, others)
    assert main(["plan", *settings, "max_steps=4000", "data.sources.cats.weight=30"]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "cats: 0.992 of the tokens, 1,015,537; about " in said and ", more than 4. - numbers: 0.00826 of" in said
    assert main(["doctor", "run=mixed", *settings, "row=3"]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "Row 3 of 320" in said and "33 of 33 places are filled. 1. numbers/one.txt, document" in said


def test_the_example_is_composed_and_its_keys_are_checked(capfd: pytest.CaptureFixture[str]) -> None:
    composed = compose_train(["data=mixture", "data.sources.docs.weight=2"]).config.data
    assert {name: (part.name, part.weight) for name, part in composed.parts.items()} == {
        "docs": ("python_docs", 2),
        "web": ("climbmix", 0.99),
    }
    assert composed.parts["web"].shuffle == "shards", "what configs/data/climbmix.yaml says"
    assert main(["train", "data=mixture", "data.sources.web.wieght=1", "data.sources.docs.seed=-1"]) == 2
    said = capfd.readouterr().err
    assert "did you mean data.sources.web.weight?" in said and "data.sources.docs.seed=-1: is below 0" in said
    assert main(["download", "data=mixture"]) == 2
    assert "data=mixture: is not fetched as one" in capfd.readouterr().err


def test_a_mixture_is_evaluated_source_by_source(trained: Path, place: Path) -> None:
    runs = [f"paths.runs={place / 'runs'}", f"paths.cache={place / 'cache'}"]
    assert main(["evaluate", "run=mixed", "stage=base", "suites=[bpb]", "num_rows=8", *runs]) == 0
    results = json.loads((place / "runs" / "mixed" / "evaluation" / "base" / "results.json").read_text("utf-8"))
    last = metrics_of(trained)[-1]
    assert results["suites"]["bpb"]["num_rows"] == 8
    assert results["suites"]["bpb"]["bpb"] == pytest.approx(float(last["val/bpb"]), rel=1e-6)
    assert results["suites"]["bpb"]["bpb_numbers"] == pytest.approx(float(last["val/bpb_numbers"]), rel=1e-6)


def test_files_that_a_strangers_mixture_names_are_not_read(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = [f"bundle={trained / 'base' / 'bundle'}", f"to={tmp_path}", "suites=[bpb]"]
    assert main(["evaluate", *bundle]) == 2
    assert "what a bundle names is not read from this machine" in " ".join(capfd.readouterr().err.split())


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_the_same(trained: Path, place: Path, others: Path) -> None:
    folder = place / "runs" / "mixed-killed"
    shutil.copytree(trained / "tokenizer", folder / "tokenizer")
    arguments = ["train", "run=mixed-killed", *mixture(place, others)]
    checkpoints = folder / "base" / "checkpoints"
    code = interrupt(
        [*COMMAND, *arguments],
        lambda: len(list(checkpoints.glob("step=*.ckpt"))) >= 2,
        signal.SIGKILL,
    )
    assert code == -signal.SIGKILL and not (folder / "base" / "finished.json").exists()
    assert main([*arguments, "data.sources.cats.download=false"]) == 0
    assert same_weights(weights_of(trained, "base"), weights_of(folder, "base"))
    assert metrics_of(trained) == metrics_of(folder)


def test_other_weights_are_another_run(trained: Path, place: Path, others: Path) -> None:
    assert main(["train", "run=mixed", *mixture(place, others), "data.sources.cats.weight=0.5"]) == 2


def test_a_source_without_text_is_named(
    place: Path, others: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n ", encoding="utf-8")
    assert main(["train", "run=hollow", *mixture(place, others), f"data.sources.cats.path={tmp_path}"]) == 2
    assert "cats" in capfd.readouterr().err
    assert not (place / "runs" / "hollow" / "base").exists()


@pytest.mark.parametrize("shuffle", ["global", "none"])
def test_a_source_whose_turn_never_comes_does_no_harm(
    place: Path, others: Path, trained: Path, shuffle: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The training ended well, and then the record of what it was made of could not be written."""
    folder = place / "runs" / f"never-{shuffle}"
    shutil.copytree(trained / "tokenizer", folder / "tokenizer")
    keys = ["max_steps=2", "data.sources.numbers.weight=0.0001", f"data.sources.numbers.shuffle={shuffle}"]
    assert main(["train", f"run={folder.name}", *mixture(place, others), *keys, "data.seed=0"]) == 0
    assert "- numbers: 0 of them" in capfd.readouterr().out
    rows = metrics_of(folder)[1:]
    assert [(row["train/tokens_numbers"], row["train/loss_numbers"]) for row in rows] == [("0", "")] * 2
    assert float(rows[-1]["val/bpb_numbers"]) > 0


class Watch(Callback):
    """Before each step the loss of every row, from the weights as they are."""

    def __init__(self) -> None:
        self.rows: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: StepBatch, batch_idx: int) -> None:
        net = GPT(tiny_model(depth=1)).materialise()
        net.load_state_dict(pl_module.net.state_dict())
        assert batch.sources is not None
        with torch.no_grad():
            self.rows.append((batch.sources, net.losses(batch.inputs.long(), batch.targets.long()).mean(dim=1)))


@pytest.mark.parametrize("log_every_steps", [1, 3])
def test_the_loss_of_a_source_is_that_of_its_rows_since_the_last_line(
    tmp_path: Path, others: Path, log_every_steps: int
) -> None:
    """Of a source that has no row there, there is no metric. Those of the steps between two lines had been dropped."""
    turns, num_rows, parts = MixtureSchedule([5, 3, 1]), 4 * ROWS_PER_STEP, {}
    for number, name in enumerate(("one", "two", "three")):
        settings = DataSettings(name="local", path=str(others / f"{('one', 'two')[number % 2]}.txt"), seed=number)
        cache = build_token_cache(open_source(settings, tmp_path), "train", byte_tokenizer(), tmp_path)
        parts[name] = packed_rows(
            cache, SEQUENCE_LEN, byte_tokenizer().bos_id, "split", tmp_path, num_rows=num_rows, seed=number
        )
    watch = Watch()
    mixed = MixedRows(parts, turns, num_rows)
    fit_tiny(tmp_path, callbacks=[watch], mixed=mixed, log_every_steps=log_every_steps)
    found = metrics_in(tmp_path)
    assert [int(row["step"]) for row in found] == ([1, 2, 3, 4] if log_every_steps == 1 else [3, 4])
    seen, steps = 0, 0
    for row in found:
        since = watch.rows[steps : int(row["step"])]
        sources, losses = (torch.cat(tensors) for tensors in zip(*since, strict=True))
        steps = int(row["step"])
        for number, name in enumerate(parts):
            of_source = losses[sources == number]
            cell = row[f"train/loss_{name}"]
            assert bool(cell) == bool(len(of_source))
            seen += len(of_source)
            if cell:
                assert float(cell) == pytest.approx(of_source.mean().item(), rel=1e-5)
    assert seen == num_rows
    assert any(row["train/loss_three"] == "" for row in found)
    stop_after(tmp_path, 2)
    fit_tiny(tmp_path, mixed=mixed, log_every_steps=log_every_steps)
    assert [row["train/loss_one"] for row in metrics_in(tmp_path)] == [row["train/loss_one"] for row in found]


@pytest.mark.parametrize("shuffle", ["global", "shards"])
def test_rows_are_the_same_for_any_number_of_processes_and_workers(
    shared: Path, tmp_path: Path, place: Path, others: Path, shuffle: str
) -> None:
    """A text that is all there, and one that may arrive, of several epochs."""
    tokenizer = Tokenizer.load(place / "runs" / "whole" / "tokenizer" / "bundle" / "tokenizer.json")
    paths = {"large": shared / "data" / "text_tiny", "small": others}
    sources = {name: WeightedSource(name="local", path=str(path), weight=1.5) for name, path in paths.items()}
    mixed: Any = open_source(DataSettings(name="mixture", sources=sources), tmp_path)  # type: ignore[arg-type]
    packing: dict[str, Any] = {"sequence_len": T, "mode": "split", "num_rows": 20 * STEPS}

    def packed(source: Source) -> Rows:
        cache = build_token_cache(source, "train", tokenizer, tmp_path)
        return packed_rows(cache, bos_id=tokenizer.bos_id, cache_dir=tmp_path, **packing)

    def open_rows() -> Any:
        small = mixed.parts["small"]
        arriving = streamed_rows(small.shards("train"), tokenizer, tmp_path, **packing) if shuffle == "shards" else None
        parts = {"large": packed(mixed.parts["large"]), "small": arriving or packed(small)}
        return MixedRows(parts, mixed.turns, 40 * STEPS)

    rows = open_rows()
    whole = hashes(rows, 0, STEPS)
    assert rows.parts()["small"].index.stats.epochs > 2
    assert len(set(whole)) == STEPS
    for world in (2, 3, 4):
        assert hashes(rows, 0, STEPS, world=world) == whole
    for num_workers in (1, 2):
        assert hashes(rows, 0, STEPS, num_workers, world=num_workers) == whole
    assert hashes(rows, 0, 23) + hashes(open_rows(), 23, STEPS, 1) == whole


@pytest.mark.slow
def test_two_sources_with_python_docs(place: Path, others: Path) -> None:
    """As the example file has it, but for the web."""
    share_corpus(place / "cache")
    docs = [f"data.sources.docs.{key}" for key in ("name=python_docs", "weight=0.25")]
    settings = [text for text in mixture(place, others) if text != "data.sources.docs=null"]
    assert main(["train", "run=with-docs", *settings, *docs]) == 0
    last = metrics_of(place / "runs" / "with-docs")[-1]
    assert [last[f"train/tokens_{name}"] for name in ("cats", "docs", "numbers")] == ["6144", "2048", "2048"]
    assert all(float(last[f"val/bpb_{name}"]) > 0 for name in ("cats", "docs", "numbers"))
