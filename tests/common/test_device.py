"""Devices, types and peaks."""

from __future__ import annotations

import re

import pytest
import torch

from nanochat_pl.common import device as hardware
from nanochat_pl.common.errors import UserError
from tests.helpers.forked import run_forked

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "text, found",
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 x\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("model name\t: bf16 machine\nflags\t\t: fpu avx2\n", False),
        ("", False),
    ],
)
def test_bfloat16_of_a_processor(tmp_path, text, found):
    (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
    assert hardware.cpu_has_bfloat16(tmp_path / "cpuinfo") is found
    assert hardware.cpu_has_bfloat16(tmp_path / "missing") is False


def test_compute_dtype(monkeypatch):
    for has, expected in [(True, "bfloat16"), (False, "float32")]:
        monkeypatch.setattr(hardware, "cpu_has_bfloat16", lambda has=has: has)
        assert hardware.choose_compute_dtype("auto", CPU) == expected
    assert hardware.choose_compute_dtype("float16", CPU) == "float16"
    with pytest.raises(UserError, match="compute_dtype='fp8'"):
        hardware.choose_compute_dtype("fp8", CPU)


def test_devices():
    assert hardware.choose_device("cpu") == CPU
    assert hardware.choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="device='tpu'"):
        hardware.choose_device("tpu")
    with pytest.raises(UserError, match="CUDA devices"):
        hardware.choose_device("cuda:999")
    assert "CPU" in hardware.device_name(CPU)


@pytest.mark.parametrize("key", ["trainer.accelerator", "accelerator"])
def test_a_device_that_is_not_there_is_told_by_the_key_that_was_set(monkeypatch, key):
    """It said device=gpu, which is no key of a command."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("gpu", "cuda", "mps"):
        with pytest.raises(UserError, match=f"^{re.escape(key)}={name}: (.|\n)*Use {re.escape(key)}=auto"):
            hardware.choose_device(name, key)


def test_nothing_happens_at_import():
    code = "import torch, nanochat_pl.common.device, nanochat_pl.model.gpt; assert not torch.cuda.is_initialized()"
    done = run_forked(["-c", code])  # of a process that has imported all that a training needs
    assert done.returncode == 0, done.stderr


CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "trained_in", "expected"),
    [
        ((9, 0), None, "bfloat16"),
        ((8, 0), "float16", "bfloat16"),
        ((7, 5), None, "float16"),
        ((7, 0), None, "float16"),
        ((7, 5), "float16", "float16"),
        # Trained in a type that reaches further: an answer would not notice an overflow.
        ((7, 5), "bfloat16", "float32"),
        ((7, 5), "float32", "float32"),
        ((6, 1), None, "float32"),
    ],
)
def test_what_a_gpu_computes_in(capability, trained_in, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert hardware.choose_compute_dtype("auto", CUDA, trained_in) == expected
    assert hardware.choose_compute_dtype("float32", CUDA, trained_in) == "float32"


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((9, 0), "sm_80 sm_86 sm_90", True),
        ((8, 9), "sm_80 sm_86 sm_90", True),
        ((8, 0), "sm_86 sm_90", False),
        ((12, 0), "sm_80 sm_86 sm_90", False),
        ((12, 0), "sm_80 sm_90 compute_90", True),
        ((7, 5), "sm_80 compute_80", False),
        ((7, 0), "sm_75 sm_80 sm_120 compute_120", False),
        ((9, 0), "sm_80 sm_90a", True),
        ((10, 0), "sm_90a compute_90a", False),
        ((10, 3), "sm_100f", True),
        ((12, 1), "sm_100f sm_120", True),
        ((9, 4), "gfx90a gfx942", True),
        ((9, 0), "", True),
    ],
)
def test_gpus_that_the_installed_code_runs_on(capability, built_for, runs):
    assert hardware.has_kernels(capability, built_for.split()) is runs


def test_a_gpu_without_code_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    with pytest.raises(
        UserError, match=r"Tesla V100 has compute capability 7\.0.* has code for sm_80, sm_90 only"
    ) as error:
        hardware.require_kernels(CUDA)
    assert "pytorch.org" in error.value.fix and "accelerator=cpu" in error.value.fix
    hardware.require_kernels(CPU)
