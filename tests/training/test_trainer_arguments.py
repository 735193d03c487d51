"""Arguments of Lightning's Trainer: none is taken and then does nothing; each that is not ours says what to type."""

from __future__ import annotations

import dataclasses
import gzip
import inspect
import json
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.profilers import PyTorchProfiler

from nanochat_pl.cli.main import main
from nanochat_pl.cli.train import compose_train
from nanochat_pl.common.errors import UserError
from nanochat_pl.training.callbacks.profile import TraceSteps
from nanochat_pl.training.config import TrainerSettings
from nanochat_pl.training.lightning_args import ARGUMENTS, Ours, Refused, Use, explain_argument
from nanochat_pl.training.module import LMModule
from tests.training.conftest import tiny_overrides, write_texts

SIGNATURE = inspect.signature(Trainer.__init__).parameters
OURS = [name for name, what in ARGUMENTS.items() if isinstance(what, Ours)]
OTHERS = [name for name in ARGUMENTS if name not in OURS]
# As people type them to Lightning.
TYPED = {
    "accumulate_grad_batches": "4",
    "fast_dev_run": "true",
    "gradient_clip_val": "1.5",
    "limit_train_batches": "0.1",
    "max_epochs": "3",
    "max_steps": "10",
    "overfit_batches": "1",
    "val_check_interval": "100",
}


def said_of(*texts: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        compose_train(texts)
    return list(caught.value.problems)


def test_every_argument_of_the_installed_trainer_has_its_answer() -> None:
    """A new version of Lightning brings new ones: write what becomes of them."""
    assert set(ARGUMENTS) == set(SIGNATURE) - {"self"}


@pytest.mark.parametrize("name", OURS)
def test_ours_are_keys_with_a_meaning(name: str) -> None:
    (field,) = [field for field in dataclasses.fields(TrainerSettings) if field.name == name]
    assert field.metadata["description"]
    assert explain_argument(name, "x") is None


@pytest.mark.parametrize("name", OTHERS)
def test_no_argument_that_is_answered_is_a_key(name: str) -> None:
    """Else the answer is never given."""
    assert name not in {field.name for field in dataclasses.fields(TrainerSettings)}


@pytest.mark.parametrize("group", ["trainer.", ""])
def test_others_are_refused_with_what_to_type(group: str) -> None:
    names = [name for name in OTHERS if group or name not in ("max_steps", "logger", "callbacks")]  # keys of the root
    typed = {name: f"{group}{name}={TYPED.get(name, '1')}" for name in names}
    said = said_of(*typed.values())
    assert len(said) == len(typed)
    for (name, text), problem in zip(typed.items(), said, strict=True):
        what = ARGUMENTS[name]
        assert problem.startswith(f"{text}: is an argument of Lightning's Trainer")
        assert not isinstance(what, Ours) and (what.why if isinstance(what, Refused) else what.note) in problem


@pytest.mark.parametrize("key", ["ckpt_path", "trainer.ckpt_path", "trainer.resume_from_checkpoint"])
def test_the_path_of_a_checkpoint_is_answered_with_how_to_resume(key: str) -> None:
    (said,) = said_of(f"{key}=runs/d4/base/checkpoints/last.ckpt")
    assert said.startswith(f"{key}: names no file here: the same command goes on with its run")
    assert "run=NEW or resume=never" in said


@pytest.mark.parametrize("name", [name for name in OTHERS if isinstance(ARGUMENTS[name], Use)])
def test_what_is_to_be_typed_can_be_typed(name: str) -> None:
    """Whatever value was given, the example is one that the command takes."""
    what = ARGUMENTS[name]
    assert isinstance(what, Use)
    values = [TYPED.get(name, "1"), "1", "0", "0.5", "-1", "true", "null", "x y", "[0, 1]"]
    for example in {what.example.replace("{}", what.value(value)) for value in values}:
        texts = [text for text in shlex.split(example) if "=" in text and not text.startswith("-")]
        assert texts == shlex.split(example)
        compose_train(texts)


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("max_steps=10", "use max_steps=10."),
        ("max_steps=-1", "use max_steps=1000."),
        ("accumulate_grad_batches=4", "use total_batch_tokens=65536 device_batch_size=4."),
        ("gradient_clip_val=1", "use optim.max_grad_norm=1."),
        ("gradient_clip_val=0", "use optim.max_grad_norm=1.0."),
        ("val_check_interval=500", "use evaluation.every_steps=500."),
        ("val_check_interval=0.25", "use evaluation.every_steps=250."),
        ("limit_val_batches=8", "use evaluation.num_rows=8."),
        ("fast_dev_run=true", "use max_steps=1."),
        ("fast_dev_run=7", "use max_steps=7."),
        ("max_epochs=2", "use stage.num_epochs=2."),
        ("log_every_n_steps=5", "use trainer.log_every_steps=5."),
        ("default_root_dir=/data/x", "use paths.runs=/data/x."),
    ],
)
def test_the_value_is_carried_over_where_it_fits(typed: str, answer: str) -> None:
    (problem,) = said_of(f"trainer.{typed}")
    assert answer in problem


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        *(("bf16-mixed", "bfloat16"), ("bf16", "bfloat16"), ("16-mixed", "float16")),
        *(("16", "float16"), ("32-true", "float32"), ("32", "float32")),
    ],
)
def test_precision_is_recorded_as_the_compute_type(precision: str, dtype: str) -> None:
    config = compose_train([f"trainer.precision={precision}", "trainer.strategy=ddp"]).config
    assert config.model.compute_dtype == dtype
    (problem,) = said_of("trainer.precision=32-true", "model.compute_dtype=bfloat16")
    assert problem.startswith("trainer.precision=32-true: is model.compute_dtype=float32, and that key says bfloat16")


def test_values_of_files_are_said_as_one_would_type_them() -> None:
    assert str(explain_argument("fast_dev_run", True)).startswith("=true: ")
    assert str(explain_argument("max_epochs", None)).startswith("=null: ")
    assert explain_argument("depth", 3) is None


def test_all_are_said_at_once_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "stages: {base: {trainer: {strategy: deepspeed, max_time: {hours: 1}}}}\n", encoding="utf-8"
    )
    typed = ["trainer.devices=0", "trainer.precision=64-true", "trainer.keep_lst=3", "trainer.accelerator=tpu"]
    assert main(["train", "experiment=mine.yaml", *typed]) == 2
    error = capsys.readouterr().err
    for part in (
        "trainer.strategy='deepspeed': must be one of auto, ddp, fsdp",
        "(mine.yaml, stages.base)",
        "trainer.devices",
        "trainer.precision='64-true': must be one of bf16-mixed, bf16, 16-mixed, 16, 32-true, 32",
        "trainer.keep_lst: there is no such key; did you mean trainer.keep_last",
        "trainer.accelerator='tpu': must be one of auto, cpu, gpu, cuda, mps.",
    ):
        assert part in error, part
    assert len(re.findall("^error: ", error, re.MULTILINE)) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("profiler", ["simple", "pytorch"])
def test_a_profile_of_a_run(tmp_path: Path, profiler: str) -> None:
    write_texts(tmp_path / "texts")
    changed = ["max_steps=8", "tokenizer.vocab_size=265", f"trainer.profiler={profiler}", "run=it"]
    assert main(["train", *tiny_overrides(tmp_path), *changed]) == 0
    text = (tmp_path / "runs" / "it" / "base" / "fit-profile.txt").read_text(encoding="utf-8")
    assert ("aten::" if profiler == "pytorch" else "training_step") in text


@pytest.mark.slow
def test_a_trace_of_a_window_of_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path / "texts")
    window = ["callbacks=profile", "callbacks.profile.first_step=3", "callbacks.profile.steps=2"]
    keys = [*tiny_overrides(tmp_path), "tokenizer.vocab_size=265", "run=it", "max_steps=5", *window]
    assert main(["train", *keys, "callbacks.profile.memory=true"]) == 0
    path = tmp_path / "runs" / "it" / "base" / "trace-steps-3-4.json.gz"
    assert f"Trace: {path}; ui.perfetto.dev" in capsys.readouterr().out
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {each.get("name", "") for each in events}
    assert {name for name in names if name.startswith("ProfilerStep#")} == {"ProfilerStep#1", "ProfilerStep#2"}
    assert "aten::mm" in names and "[memory]" in names
    TraceSteps(first_step=7).on_train_end(mock.Mock(global_step=5), None)
    assert "No trace: it begins at step 7, and the training has 5." in capsys.readouterr().out


def test_two_traces_of_the_same_steps_and_impossible_windows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="first_step=0: must be at least 1"):
        TraceSteps(first_step=0)
    trainer = mock.Mock(profiler=PyTorchProfiler(dirpath=tmp_path), default_root_dir=tmp_path)
    with pytest.raises(UserError, match=r"trainer\.profiler=pytorch: records the same steps"):
        TraceSteps().setup(trainer, None, "fit")


def test_anomalies_are_looked_for_in_the_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path / "texts")
    modes = []
    step = LMModule.training_step

    def noted(self: LMModule, batch: object, batch_idx: int) -> object:
        modes.append(torch.is_anomaly_enabled())
        return step(self, batch, batch_idx)  # type: ignore[arg-type]

    monkeypatch.setattr(LMModule, "training_step", noted)
    settings = [*tiny_overrides(tmp_path), "max_steps=1", "tokenizer.vocab_size=265"]
    assert main(["train", *settings, "run=with", "trainer.detect_anomaly=true"]) == 0
    assert modes == [True] and not torch.is_anomaly_enabled()
