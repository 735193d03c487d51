"""Whole stages on a tiny model: what they leave behind, what they inherit, what they refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers.trainers import BpeTrainer

from nanochat_pl import load_bundle
from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import UserError
from nanochat_pl.training.callbacks.evaluation import Samples
from nanochat_pl.training.stage_data import tokenizer as tokenizer_stage
from tests.training.conftest import same_weights, tiny_overrides, weights_of


def test_a_stage_leaves_what_everybody_reads(place: Path) -> None:
    folder = place / "runs" / "whole" / "base"
    for name in ("config.yaml", "about.json", "plan.json", "metrics.csv", "samples.jsonl", "finished.json"):
        assert (folder / name).is_file(), name
    bundle = load_bundle(folder / "bundle", dtype="float32")
    assert bundle.stage.stage == "base" and bundle.stage.step == 40
    assert bundle.tokenizer is not None and bundle.config.num_layers == 2
    assert bundle.net(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 290)
    finished = json.loads((folder / "finished.json").read_text(encoding="utf-8"))
    assert finished["tokens"] == 40 * 256 and 0 < finished["metrics"]["val/bpb"] < 8


def test_the_base_stage_learns(place: Path) -> None:
    lines = (place / "runs" / "whole" / "base" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    losses = [float(line.split(",")[1]) for line in lines[2:]]  # behind the header and step 0
    assert len(losses) == 40 and losses[-1] < 0.75 * losses[0]


def test_sft_starts_from_base_and_says_so(place: Path) -> None:
    stage = load_bundle(place / "runs" / "whole" / "sft" / "bundle").stage
    assert [parent["stage"] for parent in stage.parents] == ["base"]
    assert stage.data["conversations"] > 60 and stage.plan["matrix_lr"]["overridden_by"] == "inherited from base"


def test_sft_starts_from_the_weights_of_base(place: Path, train: Callable[..., int]) -> None:
    still = ("run=whole", "resume=never", "max_steps=1", "schedule.initial_lr_fraction=0")
    assert train(*still, stage="sft") == 0
    assert same_weights(weights_of(place / "runs" / "whole", "base"), weights_of(place / "runs" / "whole-2", "sft"))


def tokenizer_command(place: Path) -> list[str]:
    kept = ("data", "tokenizer.", "paths.")
    return ["train", "stage=tokenizer", *(text for text in tiny_overrides(place) if text.startswith(kept))]


def test_runs_of_the_same_text_and_settings_share_a_tokenizer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each job of a sweep trained the same one again."""
    arguments = tokenizer_command(place)
    bundles = [place / "runs" / run / "tokenizer" / "bundle" / "tokenizer.json" for run in ("shared", "shared-too")]
    assert main([*arguments, "run=shared", "tokenizer.max_chars=900000"]) == 0
    assert "Training a tokenizer of 290 tokens" in capsys.readouterr().out
    assert main([*arguments, "run=shared-too", "tokenizer.max_chars=900000"]) == 0
    out = capsys.readouterr().out
    assert "has been trained on this text before" in out and "Training a tokenizer" not in out
    assert bundles[0].read_bytes() == bundles[1].read_bytes()
    assert main([*arguments, "run=shared-not", "tokenizer.max_chars=900001"]) == 0
    assert "Training a tokenizer of 290 tokens" in capsys.readouterr().out
    kept = (place / "cache" / "tokenizers").glob("*/tokenizer.json")
    for path in [*kept]:
        path.write_bytes(path.read_bytes()[:-100])
    assert main([*arguments, "run=shared-again", "tokenizer.max_chars=900000"]) == 0
    assert "Training a tokenizer of 290 tokens" in capsys.readouterr().out, "a damaged one is made again"


def test_the_training_of_a_tokenizer_shows_how_far_it_is(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bars of the library on a terminal; elsewhere lines, where it takes long."""
    arguments = tokenizer_command(place)
    bars: list[bool] = []
    of_library = BpeTrainer
    monkeypatch.setattr(
        "nanochat_pl.tokenizer.training.trainers.BpeTrainer",
        lambda **keys: bars.append(keys.pop("show_progress")) or of_library(**keys, show_progress=False),
    )
    monkeypatch.setattr(tokenizer_stage, "SECONDS_BETWEEN_LINES", 0.0)
    assert main([*arguments, "run=lines", "tokenizer.max_chars=900002"]) == 0
    assert "characters read" in capsys.readouterr().out and bars == [False]
    monkeypatch.setattr(tokenizer_stage, "console", lambda stderr: SimpleNamespace(is_terminal=True))
    assert main([*arguments, "run=bars", "tokenizer.max_chars=900003"]) == 0
    assert "characters read" not in capsys.readouterr().out and bars == [False, True]


def test_a_line_of_the_console_says_how_it_goes(
    place: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("run=line", "max_steps=2", "evaluation.every_steps=0") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("base 2/2"))
    metrics = r"loss \d\.\d{3}  lr ×[01]\.\d\d  [\d.]+ m?s/step  [\d,]+ tok/s  epoch 0\.\d\d  ETA 0:00"
    assert re.search(metrics, line), line
    rows = (place / "runs/line/base/metrics.csv").read_text(encoding="utf-8").splitlines()
    first, last = (
        dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[-2:]
    )  # base validates before its first step
    for name in ("train/seconds", "train/flops", "train/epochs"):
        assert 0 < float(first[name]) < float(last[name]), name
    flops_per_token = json.loads((place / "runs/line/base/plan.json").read_text())["flops_per_token"]["value"]
    assert float(last["train/flops"]) == flops_per_token * float(last["train/tokens"])


def test_the_same_command_says_that_it_is_finished(
    train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("run=whole") == 0
    assert "finished" in capsys.readouterr().out


def test_another_setting_is_another_run(train: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run=whole", "optim.matrix_lr=0.5") == 2
    error = capsys.readouterr().err
    assert "optim.matrix_lr" in error and "resume=never" in error


def test_sft_cannot_change_the_model(train: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run=whole", "resume=never", "model.depth=6", stage="sft") == 2
    assert "model.depth=6" in capsys.readouterr().err


def test_a_bundle_tells_what_its_model_was_trained_with(place: Path) -> None:
    """The fine-tuned model's own settings of depth, tokenizer and text would be defaults that nobody chose."""
    base, sft = (load_bundle(place / "runs" / "whole" / name / "bundle").stage.settings for name in ("base", "sft"))
    for group in ("model", "tokenizer", "data"):
        assert sft[group] == base[group]


def test_a_prompt_that_is_too_long_is_found_at_the_start(
    train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("run=long-prompt", f"evaluation.sample_prompts=[{'cat ' * 400}]") == 2
    assert "evaluation.sample_prompts" in capsys.readouterr().err


def test_samples_with_strange_ends_of_lines_are_kept(tmp_path: Path) -> None:
    """A sample may hold U+2028, which str.splitlines takes for an end of a line."""
    samples = Samples(tmp_path / "samples.jsonl", [], 1)
    rows = [{"step": step, "prompt": "a", "text": "b\u2028c\x85d"} for step in (5, 10)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    samples.path.write_text(text + '{"step": 15, "pro', encoding="utf-8")
    samples.rewind(5)
    assert [json.loads(line) for line in samples.path.read_text(encoding="utf-8").split("\n")[:-1]] == rows[:1]


def test_sft_without_a_base(train: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run=nothing-here", stage="sft") == 2
    error = capsys.readouterr().err
    assert "base" in error and "Traceback" not in error


def test_check_only_trains_nothing(place: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run=unseen", "check_only=true") == 0
    assert not (place / "runs" / "unseen").exists()
    assert "num_steps" in capsys.readouterr().out


def test_base_takes_the_tokenizer_that_is_there(
    place: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its size is recorded as it is; another one that is asked for is refused."""
    vocabulary = "tokenizer.vocab_size=290"
    arguments = [text for text in tiny_overrides(place) if text != vocabulary]
    assert main(["train", "stage=tokenizer", "run=small", vocabulary, *arguments]) == 0
    assert main(["train", "run=small", "max_steps=2", *arguments]) == 0
    assert load_bundle(place / "runs" / "small" / "base" / "bundle").stage.settings["tokenizer"]["vocab_size"] == 290
    assert train("run=small", "resume=never", "tokenizer.vocab_size=300") == 2
    assert "tokenizer.vocab_size=300" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("total_batch_tokens=1000", "total_batch_tokens"),
        ("model.depth=300", "parameters"),
        ("data.path=/nowhere/at/all", "/nowhere/at/all"),
        ("tokenizer.vocab_size=60000", "tokenizer.vocab_size"),
    ],
)
def test_a_start_that_is_refused_leaves_nothing(
    place: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    """Neither an empty folder, which would look like a run, nor a tokenizer that was trained for nothing."""
    assert train("run=refused", "model.aspect_ratio=64", override) == 2
    assert said in capsys.readouterr().err
    assert not (place / "runs" / "refused").exists()


def test_a_training_that_breaks_off_keeps_its_figures(
    place: Path, train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise UserError("step 3: the loss is nan.")

    monkeypatch.setattr("nanochat_pl.training.callbacks.evaluation.Validation.measure", broken)
    settings = ("evaluation.every_steps=2", "evaluation.at_start=false", "trainer.checkpoint_every_steps=30")
    assert train("run=broken", *settings) == 2
    assert (place / "runs" / "broken" / "base" / "metrics.csv").read_text(encoding="utf-8").count("\n") > 1


def test_a_length_that_nobody_asked_for_is_refused_before_any_work(
    place: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("run=long", "max_steps=null", "model.depth=30", "model.aspect_ratio=64") == 2
    assert "max_steps=" in capsys.readouterr().err
    assert not (place / "runs" / "long").exists()
