"""One tiny run, trained once, for all tests that read it; and a way to train more of them."""

from __future__ import annotations

import csv
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanochat_pl.cli.main import main

SENTENCE = "the cat sat on a mat and saw one other animal that was there before it had come"


def write_texts(folder: Path) -> Path:
    """A few hundred short documents of a small language."""
    folder.mkdir(parents=True)
    chance = random.Random(0)
    documents = [" ".join(chance.choices(SENTENCE.split(), k=chance.randint(5, 60))) + "." for _ in range(400)]
    (folder / "texts.txt").write_text("\n\n".join(documents), encoding="utf-8")
    return folder


def tiny_overrides(place: Path) -> list[str]:
    """Settings of a run that takes seconds: 40 steps of 8 rows of 32 tokens."""
    return [
        "data=local",
        f"data.path={place / 'texts'}",
        "data.txt_document_chars=200",
        "tokenizer.vocab_size=290",
        "model.depth=2",
        "model.aspect_ratio=16",
        "model.head_dim=16",
        "model.sequence_len=32",
        "total_batch_tokens=256",
        "device_batch_size=8",  # in parts: fit_tiny, the steps of rl, and all on several processes
        "max_steps=40",
        "schedule.warmup_steps=4",
        "optim.matrix_lr=0.02",
        "optim.embedding_lr=0.1",
        "optim.unembedding_lr=0.01",
        "optim.scalar_lr=0.05",
        "evaluation.every_steps=20",
        "evaluation.num_rows=8",
        "evaluation.sample_tokens=2",
        "trainer.accelerator=cpu",
        "trainer.num_threads=1",
        "trainer.compile=false",
        "trainer.checkpoint_every_steps=5",
        f"paths.runs={place / 'runs'}",
        f"paths.cache={place / 'cache'}",
        "logger=[]",
    ]


LEFT_OUT = ("word_problems", "spelling", "letter_counting", "documentation", "out_of_scope")


def sft_overrides(place: Path) -> list[str]:
    """The fine-tuning that belongs to it."""
    kept = ("total_batch_tokens", "device_batch_size", "max_steps", "evaluation.", "trainer.", "paths.", "logger")
    return [
        "stage=sft",
        *(text for text in tiny_overrides(place) if text.startswith(kept)),
        *(f"mixture.tasks.{name}=null" for name in LEFT_OUT),
        "mixture.joined.share=0",
        "mixture.tasks.arithmetic.size=60",
        "mixture.tasks.identity.repeat=1",
    ]


def rl_overrides(place: Path) -> list[str]:
    """Learning from a reward that belongs to it: 6 steps of 4 prompts with 4 answers each."""
    kept = ("evaluation.", "trainer.", "paths.", "logger")
    return [
        "stage=rl",
        "device_batch_size=4",
        *(text for text in tiny_overrides(place) if text.startswith(kept)),
        "device_batch_size=8",  # half a step: each of two processes has one micro-batch, with which bits are equal
        "mixture.tasks.word_problems=null",
        "model.compute_dtype=bfloat16",  # on any machine: its bits are promised
        "rl.reward=tests.helpers.rewards.thirds",
        "rl.prompts_per_step=4",
        "rl.samples_per_prompt=4",
        "rl.max_new_tokens=8",
        "rl.eval_problems=4",
        "rl.eval_samples=2",
        "max_steps=6",
        "trainer.checkpoint_every_steps=1",
        "evaluation.every_steps=4",
    ]


def weights_of(run: Path, stage: str) -> dict[str, torch.Tensor]:
    """The weights that a stage ended with."""
    return load_file(run / stage / "bundle" / "model.safetensors")


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def start_run(place: Path, run: str, stage: str) -> Path:
    """A new run with what the stage builds on."""
    folder = place / "runs" / run
    shutil.copytree(place / "runs" / "whole" / "tokenizer", folder / "tokenizer")
    if stage == "sft":
        shutil.copytree(place / "runs" / "whole" / "base", folder / "base")
    return folder


def copy_unfinished(place: Path, run: str, stage: str = "base") -> Path:
    """The finished run once more, as one that was killed after its last resume file."""
    folder = start_run(place, run, stage)
    shutil.copytree(place / "runs" / "whole" / stage, folder / stage)
    shutil.rmtree(folder / stage / "bundle")
    (folder / stage / "finished.json").unlink()
    return folder


def metrics_of(run: Path, stage: str) -> list[tuple[str, ...]]:
    """Steps with the metrics that do not depend on the clock."""
    with (run / stage / "metrics.csv").open(encoding="utf-8", newline="") as file:
        names = ("step", "train/loss", "train/loss_smoothed", "train/lr_multiplier", "train/tokens", "val/bpb")
        return [tuple(row[name] for name in names) for row in csv.DictReader(file)]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, a cache, and the finished run `whole` with the stages tokenizer, base and sft."""
    place = tmp_path_factory.mktemp("tiny")
    write_texts(place / "texts")
    assert main(["train", "run=whole", *tiny_overrides(place)]) == 0
    assert main(["train", "run=whole", *sft_overrides(place)]) == 0
    return place


@pytest.fixture
def train(place: Path) -> Callable[..., int]:
    """Train in this process with the tiny settings; gives the exit code."""

    def train(*overrides: str, stage: str = "base") -> int:
        settings = tiny_overrides(place) if stage == "base" else sft_overrides(place)
        return main(["train", *settings, *overrides])

    return train
