"""A Mac: training, validation, samples and answers on its GPU, with what that lacks refused. The GPU is played."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanochat_pl import Engine, load_bundle
from nanochat_pl.cli.launch import processes_to_start
from nanochat_pl.cli.main import main
from nanochat_pl.common.device import choose_compute_dtype, choose_device
from nanochat_pl.training import trainer as fit
from nanochat_pl.training.strategy import OneDevice
from tests.helpers.apple_gpu import Unsupported, apple_gpu
from tests.training.conftest import metrics_of, sft_overrides, start_run, tiny_overrides


def on_apple(overrides: list[str]) -> list[str]:
    """Three steps with a validation and a resume file, on the best device there is."""
    kept = [text for text in overrides if not text.startswith(("trainer.accelerator", "max_steps"))]
    shorter = ["max_steps=3", "evaluation.every_steps=2", "trainer.checkpoint_every_steps=2", "trainer.compile=auto"]
    return [
        *(text for text in kept if not text.startswith(("evaluation.every", "trainer.ch", "trainer.com"))),
        *shorter,
    ]


@pytest.mark.slow
def test_a_stage_trains_validates_and_answers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategies = []
    monkeypatch.setattr(
        fit, "strategy_for", lambda device, name: strategies.append(OneDevice(device)) or strategies[-1]
    )
    run = start_run(place, "apple", "base")
    with apple_gpu():
        assert main(["train", "run=apple", *on_apple(tiny_overrides(place))]) == 0
        bundle = load_bundle(run / "base" / "bundle", device="mps")
        assert bundle.net.device.type == "mps"
        engine, prompt = Engine(bundle), bundle.tokenizer.encode("the cat")
        on_gpu = [engine.generate([prompt, prompt[:1]], max_tokens=4, temperature=t, top_k=5) for t in (0.0, 1.0)]
    assert strategies[0].root_device.type == "mps"
    engine = Engine(load_bundle(run / "base" / "bundle"))
    on_cpu = [engine.generate([prompt, prompt[:1]], max_tokens=4, temperature=t, top_k=5) for t in (0.0, 1.0)]
    assert [[each.ids for each in some] for some in on_gpu] == [[each.ids for each in some] for some in on_cpu]
    # The same training on the CPU; attention adds up otherwise.
    start_run(place, "no-apple", "base")
    on_cpu_instead = [text.replace("compile=auto", "compile=false") for text in on_apple(tiny_overrides(place))]
    assert main(["train", "run=no-apple", *on_cpu_instead, "model.compute_dtype=float32"]) == 0
    ours, theirs = (metrics_of(place / "runs" / name, "base") for name in ("apple", "no-apple"))
    for our_row, their_row in zip(ours, theirs, strict=True):
        assert [float(x or 0) for x in our_row] == pytest.approx([float(x or 0) for x in their_row], rel=1e-4)


@pytest.mark.slow
def test_fine_tuning_evaluation_and_chat_too(place: Path) -> None:
    start_run(place, "apple-sft", "sft")
    with apple_gpu():
        assert main(["train", "run=apple-sft", *on_apple(sft_overrides(place))]) == 0
        paths = [f"paths.{name}={place / name}" for name in ("runs", "cache")]
        asked = ["suites=[bpb,chat,samples]", "limit=1", "max_tokens=4", "num_rows=2", "num_samples=2", "temperature=1"]
        assert main(["evaluate", "run=apple-sft", "accelerator=mps", *asked, *paths]) == 0
        prompt = "prompt=What is 1 + 2?"
        assert (
            main(["chat", "run=apple-sft", "accelerator=gpu", "max_tokens=4", "temperature=0.5", prompt, *paths]) == 0
        )


def test_choices_of_a_mac() -> None:
    with apple_gpu():
        assert choose_device("auto").type == choose_device("gpu").type == "mps"
        assert choose_compute_dtype("auto", torch.device("mps")) == "float32"
        assert processes_to_start("auto", "auto") == 1


def test_what_the_device_lacks_is_refused_by_the_played_one() -> None:
    with apple_gpu():
        ones = torch.ones(2, device="mps")
        with pytest.raises(Unsupported, match="float64"):
            ones.double()
        with pytest.raises(Unsupported, match="int64"):
            torch.ones(2, device="mps", dtype=torch.int64).cumsum(0)
        with pytest.raises(Unsupported, match="two devices"):
            ones + torch.ones(2)
        with pytest.raises(Unsupported, match="no kernel"):
            torch.linalg.eigh(torch.eye(2).to("mps"))
