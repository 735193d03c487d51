"""The command as it is typed, on machines that are played: what it comes to on eight GPUs, on one, on a CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat_pl.cli._full_plan import full_plan
from nanochat_pl.cli.launch import processes_to_start
from nanochat_pl.cli.main import main
from nanochat_pl.cli.train import compose_train
from nanochat_pl.planning import Plan
from tests.helpers.corpus import share_corpus

COMMAND = ("stage=base", "model.depth=20")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes PyTorch see GPUs: their number, name, memory in GiB and compute capability."""

    def see(number: int, name: str, memory: float, capability: tuple[int, int]) -> None:
        properties = SimpleNamespace(name=name, total_memory=int(memory * 2**30), uuid="0")
        arch = f"sm_{capability[0]}{capability[1]}"
        for function, value in {
            "is_available": True,
            "device_count": number,
            "get_device_capability": capability,
            "get_device_name": name,
            "get_device_properties": properties,
            "get_arch_list": [arch],
        }.items():
            monkeypatch.setattr(torch.cuda, function, lambda *_, value=value: value)

    return see


def planned(*overrides: str) -> Plan:
    return full_plan(compose_train(overrides).config)[0]


def test_eight_gpus(gpus: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpus(8, "NVIDIA H100 80GB HBM3", 79.0, (9, 0))
    config = compose_train(COMMAND).config
    assert processes_to_start(config.trainer.accelerator, config.trainer.devices) == 8
    plan = planned(*COMMAND, f"paths.cache={tmp_path}")
    assert plan["processes"] == plan["num_devices"] == 8
    assert plan["compute_dtype"] == "bfloat16" and plan["compiled"] is True
    assert plan["attention"] == "varlen (window 512), sdpa (window 2,048)"
    assert plan["shards_needed"] == 155 and plan["device_batch_size"] == 32
    assert main(["train", *COMMAND, f"paths.cache={tmp_path}", "check_only=true"]) == 0
    out = capsys.readouterr().out
    assert "climbmix" in out and "Plan for NVIDIA H100" in out and "refuses" not in out


def test_one_old_gpu_computes_in_float16(gpus: Any, tmp_path: Path) -> None:
    gpus(1, "Tesla T4", 14.5, (7, 5))
    plan = planned("stage=base", "model.depth=12", f"paths.cache={tmp_path}")
    assert plan["processes"] == 1 and plan["compute_dtype"] == "float16"
    assert plan["attention"].startswith(("flex (window 512)", "bands"))  # flex where this PyTorch has it


def test_plan_for_machines_that_are_elsewhere(gpus: Any, tmp_path: Path) -> None:
    """The same as on the machine itself, but for what only that knows."""
    from nanochat_pl.cli.plan import PlanConfig
    from nanochat_pl.config.experiment import compose_step

    gpus(8, "NVIDIA H100 80GB HBM3", 79.0, (9, 0))
    here = planned(*COMMAND, f"paths.cache={tmp_path}")
    typed = [*COMMAND, f"paths.cache={tmp_path}", "hardware=h100", "num_devices=8"]
    there = full_plan(compose_step("plan", "base", PlanConfig, typed).config)[0]
    names = (
        "num_steps",
        "total_batch_tokens",
        "device_batch_size",
        "matrix_lr",
        "shards_needed",
        "attention",
        "compiled",
    )
    assert {name: here[name] for name in names} == {name: there[name] for name in names}


def refusal(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    assert main(["train", *COMMAND, *overrides]) == 2
    return capsys.readouterr().err


def test_a_cpu_refuses_hours_and_says_what_it_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = (f"paths.cache={tmp_path}", f"paths.runs={tmp_path / 'runs'}")
    error = refusal(capsys, *places)
    assert error.count("error:") == 1 and "days on this CPU (limit: 1 hour)" in error
    assert "model.depth=4 max_steps=20 takes minutes. yes=true trains all the same." in error
    assert "more data" not in error and not [*(tmp_path / "runs").rglob("*")]
    assert main(["plan", *COMMAND, *places]) == 0
    out = capsys.readouterr().out
    assert "train refuses it unasked" in out and "model.depth=4 max_steps=20" in out.splitlines()[-1]


@pytest.mark.slow
def test_what_a_cpu_is_advised_to_do_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    share_corpus(tmp_path)
    places = (f"paths.cache={tmp_path}", f"paths.runs={tmp_path / 'runs'}")
    assert main(["plan", *COMMAND, *places]) == 0
    command = capsys.readouterr().out.splitlines()[-1].partition("nanochat-pl ")[2].split()
    assert command[0] == "train" and main([*command, "check_only=true"]) == 0
    smaller = ["model.sequence_len=128", "total_batch_tokens=1024", "tokenizer.vocab_size=512", "evaluation.num_rows=8"]
    assert main([*command, *smaller, "max_steps=2", "trainer.compile=false"]) == 0, "as it is each step takes minutes"
    assert (tmp_path / "runs" / "d4" / "base" / "finished.json").is_file()


def test_yes_trains_what_is_refused_unasked(tmp_path: Path) -> None:
    """Four epochs of a small text are not enough for the plan of its own."""
    (tmp_path / "a.txt").write_text("\n\n".join(f"Line {n} of a text." for n in range(600)), encoding="utf-8")
    small = ["model.depth=1", "model.aspect_ratio=16", "model.head_dim=16", "model.sequence_len=32"]
    small += [
        "tokenizer.vocab_size=290",
        "data=local",
        "data.txt_document_chars=200",
        f"data.path={tmp_path / 'a.txt'}",
        "trainer.compile=false",
    ]
    small += [f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}", "logger=[]"]
    small += ["trainer.accelerator=cpu", "evaluation.sample_tokens=1", "total_batch_tokens=4096"]
    assert main(["train", *small]) == 2
    assert main(["train", *small, "yes=true"]) == 0


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.depth=2", "max_steps=30", "data=python_docs"),
        ("model.depth=2", "max_steps=30"),
        ("model.depth=3", "tokenizer.vocab_size=512", "max_steps=7", "model.sequence_len=128"),
        ("model.depth=2", "tokens_per_parameter=0.01", "tokenizer.vocab_size=512", "model.sequence_len=64"),
    ],
)
def test_the_plan_is_what_train_does(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """`plan` took a batch of 131,072 tokens and another learning rate where the training took 16,384."""
    import dataclasses

    from nanochat_pl.common.paths import cache_folder
    from nanochat_pl.data.sources.auto import choose_data
    from nanochat_pl.training.device import Machine
    from nanochat_pl.training.stage_data import text as prepare
    from nanochat_pl.training.stage_data.base_plan import bounding_tokens
    from nanochat_pl.training.stage_data.source import tokens_planned

    config = compose_train([*overrides, "trainer.accelerator=cpu", "trainer.compile=false"]).config
    plan = full_plan(config)[0]
    cache = cache_folder(config.paths)
    config = dataclasses.replace(config, data=choose_data(config.data, tokens_planned(config), cache))
    machine = Machine(torch.device("cpu"), "a CPU", plan["compute_dtype"], False)
    vocab_size = config.tokenizer.vocab_size
    trained = prepare._base_plan(config, machine, vocab_size, bounding_tokens(config.data, vocab_size, cache))
    assert {name: plan[name] for name in trained.values} == {name: trained[name] for name in trained.values}
