"""Which GPU a process takes, what it computes in and whether it compiles, without any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from nanochat_pl.cli.train import compose_train
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.launch_env import LaunchEnv
from nanochat_pl.model import fp8
from nanochat_pl.model.attention import choice
from nanochat_pl.model.config import ModelSettings
from nanochat_pl.planning import Plan
from nanochat_pl.training import compile_proof
from nanochat_pl.training import device as machine
from nanochat_pl.training.config import StageSettings, TrainConfig, TrainerSettings
from tests.helpers.processes import run


@pytest.mark.parametrize(
    ("place", "found", "index"),
    [((1, 2, 1, 2), 2, 1), ((9, 16, 1, 8), 8, 1), ((3, 4, 3, 4), 1, 0), ((0, 1, 0, 1), 8, None)],
    ids=["two of two", "the second node", "each sees its own", "alone"],
)
def test_the_gpu_of_a_process(
    place: tuple[int, int, int, int], found: int, index: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "choose_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(machine, "launch_env", lambda: LaunchEnv(*place))
    monkeypatch.setattr(machine, "require_kernels", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    assert machine.own_device("auto") == torch.device("cuda", index)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "choose_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(machine, "launch_env", lambda: LaunchEnv(2, 4, 2, 4))
    monkeypatch.setattr(machine, "require_kernels", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="4 processes on a machine where PyTorch sees 2 GPUs") as error:
        machine.own_device("auto")
    assert error.value.fix == "Start 2 processes, or use trainer.accelerator=cpu."
    with pytest.raises(UserError, match="or use accelerator=cpu") as error:  # as evaluate has it
        machine.own_device("auto", "accelerator")
    assert "trainer." not in str(error.value)


def asked(numbers: list[str], visible: list[str]) -> str:
    """What is said where the processes see GPUs of these numbers."""
    rank = machine.launch_env().rank
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=numbers[rank]))
        patched.setenv("CUDA_VISIBLE_DEVICES", visible[rank])
        try:
            machine.require_own_gpus(torch.device("cuda", 0))
        except UserError as error:
            return str(error)
    return ""


def test_processes_that_share_a_gpu_are_refused_on_all() -> None:
    assert run(3, asked, ["a", "b", "c"], ["0", "0", "0"]) == [""] * 3, "each in a container of its own"
    assert run(3, asked, ["a", "a", "a"], ["MIG-1", "MIG-2", "MIG-3"]) == [""] * 3, "parts of one"
    for said in run(3, asked, ["a", "b", "b"], ["0", "1", "1"]):
        assert said.startswith("Processes 1 and 2 have the same GPU")


@pytest.mark.parametrize(
    ("name", "capability", "said"),
    [
        (
            "NVIDIA H100",
            (9, 0),
            [
                "Training on NVIDIA H100 in bfloat16, compiled.",
                "Attention: varlen in windows of 512, sdpa in windows of 2,048; not FA3: flash_attn_interface is not"
                " installed; not FA4: flash_attn.cute is not installed; not products: it is for CPUs and rows of at"
                " most 1,024 positions.",
            ],
        ),
        (
            "Tesla T4",
            (7, 5),
            [
                "Training on Tesla T4 in float16 (with a loss scale; it has no units for bfloat16), compiled.",
                "Attention: bands in windows of 512, sdpa in windows of 2,048; not FA3: it needs compute capability"
                " 8.0, the GPU has 7.5; not FA4: it needs compute capability 8.0, the GPU has 7.5; not products: it is"
                " for CPUs and rows of at most 1,024 positions; not varlen: it needs compute capability 8.0, the GPU"
                " has 7.5; not flex: it does not run here: no Triton.",
            ],
        ),
    ],
)
def test_what_is_chosen_on_a_gpu_is_said(
    name: str,
    capability: tuple[int, int],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for attribute, answer in {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": capability,
        "get_device_name": name,
        "get_arch_list": ["sm_75", "sm_80", "sm_90"],
    }.items():
        monkeypatch.setattr(torch.cuda, attribute, lambda *device, answer=answer: answer)
    monkeypatch.setattr(machine, "why_not_compiled_here", lambda *kind: None)
    tried = mock.Mock(side_effect=lambda name, *case: "it does not run here: no Triton" if name == "flex" else None)
    monkeypatch.setattr(choice, "what_is_wrong", tried)
    chosen = machine.prepare_machine(TrainConfig())
    assert chosen.choices()["attention"] == said[1].removeprefix("Attention: ").partition(";")[0]
    assert (chosen.device.type, chosen.compile) == ("cuda", True)
    assert chosen.compute_dtype == ("bfloat16" if capability >= (8, 0) else "float16")
    assert " ".join(capsys.readouterr().out.split()) == " ".join(said)


@pytest.mark.parametrize(
    ("settings", "grouped", "window", "value_embedding"),
    [
        (ModelSettings(depth=20), False, 6, True),
        (ModelSettings(depth=20, num_kv_heads=2, window_pattern="L", value_embeddings=False), True, 24, False),
        (ModelSettings(depth=1), False, 24, True),
    ],
)
def test_the_compiler_is_tried_with_a_tiny_model_of_the_same_kind(
    settings: ModelSettings, grouped: bool, window: int, value_embedding: bool
) -> None:
    config = compile_proof.config_of_its_kind(settings, "bfloat16")
    assert (config.num_layers, config.head_dim, config.compute_dtype) == (1, 128, "bfloat16")
    assert config.windows == (window,)
    assert bool(config.value_embedding_layers) == value_embedding
    assert (config.num_kv_heads < config.num_heads) == grouped


TINY = ModelSettings(depth=2, head_dim=16)


def test_attention_is_computed_by_what_the_settings_say(capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU; nothing is said of the usual choice."""

    def prepared(attention: str, compile: bool = False) -> machine.Machine:
        trainer = TrainerSettings(accelerator="cpu", compile=compile, attention=attention)  # type: ignore[arg-type]
        return machine.prepare_machine(TrainConfig(model=TINY, trainer=trainer))

    assert prepared("auto").attention == "bands in windows of 512, sdpa in windows of 2,048"
    assert "Attention" not in capsys.readouterr().out
    assert prepared("products").attention == "products"
    assert "Attention: products." in capsys.readouterr().out
    assert prepared("sdpa").attention == "bands in windows of 512, sdpa in windows of 2,048"
    for name, reason in {"varlen": "it is for GPUs of NVIDIA", "flex": "it has a backward on GPUs alone"}.items():
        with pytest.raises(UserError, match=rf"trainer\.attention={name}: {reason}"):
            prepared(name)


def test_a_compiler_that_fails_or_is_wrong_trains_eagerly_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cpu = torch.device("cpu")

    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # one that changes nothing
    assert machine.compiler_works(tmp_path / "another", cpu, "float32", TINY)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *inputs: _larger(function(*inputs)))
    assert not machine.compiler_works(tmp_path, cpu, "float32", TINY)
    assert "gradients of a tiny model are" in capsys.readouterr().out
    monkeypatch.setattr(torch, "compile", broken)
    assert not machine.compiler_works(tmp_path, cpu, "float32", TINY)
    said = " ".join(capsys.readouterr().out.split())
    assert said == "torch.compile: it does not run here: no compiler: training eagerly."
    assert not machine.compiler_works(tmp_path, torch.device("mps"), "float32", TINY)


def test_that_the_compiler_works_is_remembered_as_long_as_all_is_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It took 12 seconds of each start. What speaks against it is not remembered: it may have been mended."""
    tried: list[str] = []
    answers = [None, "no compiler", None, None, None]

    def why_not(device: torch.device, dtype: str, *rest: object) -> str | None:
        tried.append(dtype)
        return answers[len(tried) - 1]

    monkeypatch.setattr(compile_proof, "why_not_compiled", why_not)
    cpu, asked = torch.device("cpu"), compile_proof.why_not_compiled_here
    assert [asked(tmp_path, cpu, "float32", TINY) for _ in range(2)] == [None, None] and len(tried) == 1
    assert [asked(tmp_path, cpu, "bfloat16", TINY) for _ in range(3)] == ["no compiler", None, None]
    monkeypatch.setenv("CXX", "another")
    assert asked(tmp_path, cpu, "float32", TINY) is None and len(tried) == 4
    for path in (tmp_path / "compiler_works").iterdir():
        path.write_text("{", encoding="utf-8")
    assert asked(tmp_path, cpu, "float32", TINY) is None and len(tried) == 5


def _larger(result: object) -> object:
    return result * 1.01 if isinstance(result, torch.Tensor) else tuple(each * 1.01 for each in result)  # type: ignore[attr-defined]


def test_the_model_of_the_settings_is_the_one_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(machine, "why_not_compiled_here", lambda *kind: tried.append(kind))
    config = TrainConfig(model=TINY, trainer=TrainerSettings(accelerator="cpu"))
    assert machine.prepare_machine(config).compile and tried[0][3] is TINY


def test_a_training_too_short_for_the_compiler_is_eager_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three steps of a tiny model after minutes of compiling. Where settings give the length, nothing is tried."""
    tried = []
    monkeypatch.setattr(machine, "why_not_compiled_here", lambda *kind: tried.append(kind))
    cpu = TrainerSettings(accelerator="cpu")
    said = "torch.compile: not worth it for 10 steps of so little: training eagerly (trainer.compile=true compiles)."

    def prepared(steps: int | None, tokens: int | None = 1024, trainer: TrainerSettings = cpu) -> machine.Machine:
        return machine.prepare_machine(
            TrainConfig(model=TINY, max_steps=steps, total_batch_tokens=tokens, trainer=trainer)
        )

    assert not prepared(10).compile and tried == [] and said in " ".join(capsys.readouterr().out.split())
    assert prepared(10, trainer=replace(cpu, compile=True)).compile
    assert prepared(10_000_000).compile and len(tried) == 1
    config, unknown = TrainConfig(model=TINY, trainer=cpu), prepared(10, tokens=None)
    assert unknown.compile, "the plan tells"
    assert "not worth it" not in capsys.readouterr().out

    def with_plan(steps: int, settings: TrainConfig = config) -> machine.Machine:
        plan = Plan()
        for name, value in {"num_steps": steps, "flops_per_token": 1_000_000, "total_batch_tokens": 1024}.items():
            plan.derive(name, value, "given")
        return machine.with_plan(unknown, settings, plan)

    assert not with_plan(10).compile and said in " ".join(capsys.readouterr().out.split())
    assert not with_plan(9_000).compile
    assert with_plan(11_000) is unknown
    assert with_plan(10, replace(config, trainer=replace(cpu, compile=True))) is unknown


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_the_demo_is_worth_compiling(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "why_not_compiled_here", lambda *kind: None)
    config = compose_train(["experiment=demo", f"stage={stage}", "trainer.accelerator=cpu"]).config
    assert machine.prepare_machine(config).compile


def fp8_settings(fp8: bool | str, stage: str = "base", depth: int = 26, **trainer: Any) -> TrainConfig:
    model, settings = ModelSettings(depth=depth), TrainerSettings(fp8=fp8, compile=True, **trainer)  # type: ignore[arg-type]
    return TrainConfig(stage=StageSettings(name=stage), model=model, trainer=settings)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """This machine has a GPU of a generation, whose kernels are right."""

    def has(capability: tuple[int, int]) -> None:
        for attribute, answer in {
            "is_available": True,
            "device_count": 1,
            "get_device_capability": capability,
            "get_device_name": "A GPU",
            "get_arch_list": ["sm_80", "sm_90"],
        }.items():
            monkeypatch.setattr(torch.cuda, attribute, lambda *device, answer=answer: answer)
        monkeypatch.setattr(fp8, "distance_of_kernels", lambda device: 0.0)
        monkeypatch.setattr(choice, "what_is_wrong", mock.Mock(return_value=None))

    return has


def test_fp8_is_taken_where_the_gpu_has_it(gpu: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    gpu((9, 0))
    for wanted in (True, "auto"):
        assert machine.prepare_machine(fp8_settings(wanted)).fp8 == "scaled_mm"
        said = " ".join(capsys.readouterr().out.split())
        assert said.startswith("Training on A GPU in bfloat16 with products in FP8, compiled. Attention: ")
    assert machine.prepare_machine(fp8_settings(False)).fp8 is None


def test_fp8_that_is_not_there_is_refused_and_with_auto_left_out(
    gpu: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    gpu((8, 6))
    with pytest.raises(UserError) as error:
        machine.prepare_machine(fp8_settings(True))
    assert list(error.value.problems) == [
        "trainer.fp8=true: cannot be had on A GPU: it needs compute capability 8.9, the GPU has 8.6."
    ]
    assert machine.prepare_machine(fp8_settings("auto")).fp8 is None
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(
        "No FP8: it needs compute capability 8.9, the GPU has 8.6. Training on A GPU in bfloat16, com"
    )
    with pytest.raises(UserError, match=r"CPU.*it is for GPUs of NVIDIA"):
        machine.prepare_machine(
            replace(fp8_settings(True, accelerator="cpu"), model=ModelSettings(depth=26, compute_dtype="bfloat16"))
        )


def test_fp8_in_a_small_or_an_eager_model_is_announced_as_slow(
    gpu: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    gpu((9, 0))
    machine.prepare_machine(fp8_settings(True, depth=12))
    assert "trainer.fp8=true: model.depth=12 is likely to be slower" in " ".join(capsys.readouterr().out.split())
    config = fp8_settings("auto")
    machine.prepare_machine(replace(config, trainer=replace(config.trainer, compile=False)))
    assert "trainer.fp8=auto: without trainer.compile the scaling" in " ".join(capsys.readouterr().out.split())


def test_reinforcement_learning_leaves_fp8_out(gpu: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    gpu((9, 0))
    assert machine.prepare_machine(fp8_settings(True, stage="rl")).fp8 is None
    assert "trainer.fp8=true: rl trains without it" in capsys.readouterr().out
